"""`inspect_routing` on transformers' own sparse models, with tiny processors made offline."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_processors import tiny_processor
from PIL import Image
from sparse_families import IMAGE, VIDEO, FamilyCollator, family_config, row, sparse_family

import vlmoe
from vlmoe.data.answers import prompt_inputs
from vlmoe.data.native_collator import NativeCollator
from vlmoe.routing.inspection.analysis import DatasetRouting
from vlmoe.routing.inspection.native_images import native_images
from vlmoe.routing.inspection.page import percent
from vlmoe.routing.inspection.report import RoutingInspection
from vlmoe.routing.inspection.tokens import ImageBox, layer_strip, trace_prompt
from vlmoe.routing.trace import TokenRouting, record_routing
from vlmoe_cli import main

GRIDS = {  # of the picture below as its processor resizes it: rows, columns, pixels of a cell
    "qwen3_vl_moe": (1, 2, 8),
    "internvl_qwen3_moe": (2, 2, 8),
}
SLOW_GRIDS = {
    "llava_qwen3_moe": (2, 2, 4),
    "qwen3_5_moe": (1, 2, 8),
    "glm4v_moe": None,
    "gemma4": None,
}


def halves() -> Image.Image:
    """Black on the left, white on the right."""
    pixels = np.zeros((16, 24, 3), dtype=np.uint8)
    pixels[:, 12:] = 255
    return Image.fromarray(pixels)


def rows() -> list[dict[str, Any]]:
    question = {"image": halves(), "question_type": "side"}
    return [
        question | {"question": "dark side?", "answer": "left"},
        question | {"question": "how many?", "answer": "two", "question_type": "number"},
        {"question": "is it red?", "answer": "no", "question_type": "side"},
    ]


@pytest.mark.parametrize(
    "family", [*GRIDS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_GRIDS)]
)
def test_image_tokens_lie_on_the_picture_in_the_order_of_the_model(
    family: str, tmp_path: Path
) -> None:
    model, processor = sparse_family(family).eval(), tiny_processor(family)
    found = vlmoe.inspect_routing(
        model, processor, rows(), max_new_tokens=2, batch_size=2, before=model
    )
    prompt = found.prompts[0]
    [image] = prompt.images
    experts = image.tiles[-1].experts  # (L, R, S)
    is_image = prompt.routing.is_image
    chosen = prompt.routing.first_choices[:, is_image]
    shown = np.concatenate([tile.experts.reshape(len(experts), -1) for tile in image.tiles], 1)
    assert shown.tolist() == chosen.tolist(), "one cell for each image token, row by row"
    tiles = (2, 3, 7) if family.startswith("internvl") else (0, 0, 1)
    assert (image.rows, image.cols, len(image.tiles)) == tiles
    expected = (GRIDS | SLOW_GRIDS)[family]
    if expected is not None:
        assert (*experts.shape[1:], image.tiles[0].cell_size[0]) == expected
    picture = image.tiles[-1].picture
    assert picture[:, 0].mean() < 40 and picture[:, -1].mean() > 215, "the same way round"

    assert found.before is not None and found.before.change is not None
    assert found.before.change["all"]["changed"] == [0.0] * len(found.layers)
    assert found.routing is not None and found.types is not None
    assert found.types["types"] == ["number", "side"]
    text = found.save(tmp_path).read_text(encoding="utf-8")
    assert "How the work is shared" in text and f"image ({int(is_image.sum())} tokens)" in text
    tokens = json.loads((tmp_path / "inspection.json").read_text())["prompts"][0]["tokens"]
    assert {token["kind"] for token in tokens} == {"text", "image"}


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "glm4v_moe"])
def test_each_cell_shows_what_its_token_was_made_of(family: str) -> None:
    processor = tiny_processor(family)
    processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 4096}
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(pixels.repeat(8, 0).repeat(8, 1))  # 3 x 4 squares, one for each token
    inputs = prompt_inputs(processor, "what?", [image])
    kinds = (inputs["input_ids"][0] == IMAGE).long()
    experts = (kinds.cumsum(0) - 1)[None, :, None]
    routing = TokenRouting((0,), 12, inputs["input_ids"][0], kinds, experts, experts.float())
    [found] = native_images(routing, [image], processor, family_config(family), inputs)
    [tile] = found.tiles
    assert tile.experts[0].tolist() == np.arange(12).reshape(3, 4).tolist()
    own = processor.image_processor
    seen = inputs["pixel_values"].view(12, 4, 3, -1).mean((1, 3))  # (tokens, RGB)
    seen = seen * torch.tensor(own.image_std) + torch.tensor(own.image_mean)
    shown = torch.tensor(tile.picture.reshape(3, 8, 4, 8, 3)).float().mean((1, 3)) / 255
    torch.testing.assert_close(shown.view(12, 3), seen, atol=0.01, rtol=0)


def test_counts_of_a_dataset_are_those_of_one_forward_pass_for_each_row() -> None:
    family = "qwen3_vl_moe"
    model, processor = sparse_family(family).eval(), tiny_processor(family)
    found = vlmoe.inspect_routing(model, processor, rows(), max_new_tokens=1, batch_size=3)
    assert found.routing is not None
    collate = NativeCollator(processor)
    for number, each in enumerate(rows()):
        batch = collate([each])
        del batch["labels"]
        with record_routing(model) as alone, torch.no_grad():
            model(**batch)
        counts = alone.load.assignments.numpy()  # (L, M, E)
        assert found.routing.counts[number].tolist() == counts.tolist()


def test_video_tokens_are_a_kind_of_their_own(tmp_path: Path) -> None:
    model, processor = sparse_family("qwen3_vl_moe").eval(), tiny_processor("qwen3_vl_moe")
    ids = torch.tensor([[20, 8, *[VIDEO] * 4, 9, 21, 8, *[VIDEO] * 4, 9, 22]])
    types = torch.where(ids == VIDEO, 2, 0)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": types,
        "pixel_values_videos": torch.randn(32, 2 * 3 * 4 * 4),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    prompt = trace_prompt(model, processor, inputs, [], "what moves?", 2)
    [video] = prompt.images
    assert video.kind == "video" and len(video.tiles) == 2 and not video.has_whole
    assert video.tiles[0].experts.shape == (2, 2, 2)
    expected = prompt.routing.first_choices[:, prompt.routing.kinds == 2]
    shown = np.concatenate([tile.experts.reshape(2, -1) for tile in video.tiles], 1)
    assert shown.tolist() == expected.tolist()
    found = RoutingInspection.of_prompts("m", [prompt])
    text = found.save(tmp_path).read_text(encoding="utf-8")
    assert "The video has 2 steps of time" in text and text.count("video (4 tokens)") == 4


def test_ernies_bank_for_images_has_a_figure_of_its_own(tmp_path: Path) -> None:
    family = "ernie4_5_vl_moe"
    model, processor = sparse_family(family).eval(), tiny_processor("qwen3_vl_moe")
    inputs = FamilyCollator(family)([row(9, 2, 0, images=1)])
    del inputs["labels"]
    prompt = trace_prompt(model, processor, inputs, [halves().resize((16, 16))], "what?", 2)
    [image] = prompt.images
    chosen = prompt.routing.first_choices[:, prompt.routing.is_image]
    assert image.tiles[0].experts.reshape(1, 4).tolist() == chosen.tolist()
    with record_routing(model) as alone, torch.no_grad():
        model(**inputs)
    found, routing = RoutingInspection.of_prompts("m", [prompt]), prompt.routing
    counts = np.zeros((1, 1, 3, 4), dtype=np.int32)
    seen = [tensor.numpy() for tensor in (routing.first_choices, routing.token_ids, routing.kinds)]
    found.add_rows("row", DatasetRouting(alone.layers, alone.load.as_dict(), [""], counts, *seen))
    text = found.save(tmp_path).read_text(encoding="utf-8")
    [share] = alone.load.as_dict()["vision"]["vision"]["image_share"]
    assert f"expert {share.index(max(share))} gets {percent(max(share))} of what image and" in text
    assert "load_vision" in found.figures


def test_image_tokens_without_a_known_grid_are_shown_like_words() -> None:
    family = "llava_qwen3_moe"
    model, processor = sparse_family(family).eval(), tiny_processor(family)
    model.config.model_type = "another"
    found = vlmoe.inspect_routing(
        model, processor, question="what?", images=[halves()], max_new_tokens=2
    )
    assert found.prompts[0].images == [] and "image" in found.prompts[0].loose


def test_images_that_follow_each_other_have_boxes_of_their_own() -> None:
    """LLaVA's template writes nothing between them."""
    family = "llava_qwen3_moe"
    model, processor = sparse_family(family).eval(), tiny_processor(family)
    found = vlmoe.inspect_routing(
        model, processor, question="same?", images=[halves(), halves()], max_new_tokens=2
    )
    [prompt] = found.prompts
    boxes = [box for box in layer_strip(prompt, 0).boxes if isinstance(box, ImageBox)]
    assert [box.tokens for box in boxes] == [4, 4]
    assert boxes[1].place == boxes[0].place + 4
    first = prompt.routing.first_choices[0].tolist()
    for box in boxes:
        of_box = Counter(first[box.place : box.place + 4])
        assert dict(box.counts) == of_box


def test_a_language_model_has_no_pictures() -> None:
    model, tokenizer = sparse_family("mixtral").eval(), tiny_processor("mixtral")
    found = vlmoe.inspect_routing(model, tokenizer, question="what?", max_new_tokens=2)
    assert found.prompts[0].images == [] and found.num_experts == 4


@pytest.mark.slow
def test_the_command_takes_a_saved_language_model_and_an_earlier_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_processor("qwen3_moe")
    for name, seed in (("old", 1), ("new", 0)):
        sparse_family("qwen3_moe", seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    data = [{"question": f"{n} and 1?", "answer": str(n + 1)} for n in range(4)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, data)))
    where = ["--model", str(tmp_path / "new"), "--before", str(tmp_path / "old")]
    where += ["--dataset", str(tmp_path / "test.jsonl"), "--output_dir", str(tmp_path / "out")]
    assert main.main(["inspect", *where, "--max_new_tokens", "2", "--device", "cpu"]) == 0
    assert "layer" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert numbers["before"]["changed"]["text"]["changed"][0] > 0
    assert numbers["before"]["changed"]["image"] is None
