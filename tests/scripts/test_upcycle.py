"""`vlmoe upcycle`: model and processor of a dense folder become those of a sparse one."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_process import command
from huggingface_hub import HfApi, ModelCard
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    pipeline,
)

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor, upcycle
from vlmoe.upcycling.report import UpcyclingReport
from vlmoe_cli import main

TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
VISION = (*TEXT, "image_size", "patch_size")


@pytest.fixture
def dense_folder(tmp_path: Path, tiny_config: Callable[..., Any], tokenizer: Any) -> Path:
    """A tiny Idefics3 with processor, as it is on the Hub."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<fake_token_around_image>", "<end_of_utterance>"], special_tokens=True)
    tokenizer.chat_template = None
    config = tiny_config()
    text = {name: getattr(config.text_config, name) for name in TEXT}
    vision = {name: getattr(config.vision_config, name) for name in VISION}
    sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(**sizes), tokenizer, 4, chat_template="{{ messages[0].content }}"
    )
    dense = AutoModelForImageTextToText.from_config(
        Idefics3Config(
            text_config=LlamaConfig(**text, vocab_size=len(tokenizer) + 3, pad_token_id=0),
            vision_config=vision,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            scale_factor=2,
        )
    )
    dense.generation_config.max_new_tokens = 7
    dense.save_pretrained(tmp_path / "dense")
    processor.save_pretrained(tmp_path / "dense")
    front = "---\nlicense: mit\nbase_model: user/older\n---\n"
    (tmp_path / "dense" / "README.md").write_text(front)
    return tmp_path / "dense"


def test_model_processor_and_report_are_there(
    dense_folder: Path,
    tmp_path: Path,
    make_image: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "sparse"
    arguments = ["--num_experts", "4", "--expert_split", "2", "--sparse_layers", "0,2"]
    fields = ["--fields", '{"router_aux_loss_coef": 0.02}', "--router_std", "1"]
    arguments += ["--target", "vlmoe"]
    command = ["upcycle", str(dense_folder), "--output_dir", str(output), *arguments, *fields]
    assert main.main(command) == 0
    printed = capsys.readouterr().out
    assert "exact at step 0 only" in printed and f"Saved to {output}." in printed

    report = UpcyclingReport.load(output)
    assert report.error <= 1e-5 and report.same_argmax == 1.0
    assert report.sample["images"] > 3, "pictures larger than a tile are cut into several"
    assert report.loss["sparse"] == pytest.approx(report.loss["dense"], abs=1e-5)

    card = ModelCard.load(output / "README.md")
    assert card.data.license == "mit" and card.data.base_model == ["user/older"]
    assert "4 copies of each dense MLP, each cut into 2 experts" in card.text
    assert "exact at step 0 only" in card.text

    model = AutoModelForImageTextToText.from_pretrained(output)
    text = model.config.text_config
    assert (text.num_experts, text.num_experts_per_tok, text.mlp_only_layers) == (8, 4, [1])
    assert text.router_aux_loss_coef == 0.02
    assert model.generation_config.max_new_tokens == 7
    ours = VLMoEProcessor.from_pretrained(output)
    theirs = AutoProcessor.from_pretrained(dense_folder)
    dense = AutoModelForImageTextToText.from_pretrained(dense_folder)
    call = {"images": [[make_image(0, (40, 20))]], "text": ["a <image> b"], "return_tensors": "pt"}
    inputs, expected = ours(**call), theirs(**call)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    with torch.no_grad():
        wanted = dense(**{k: v for k, v in expected.items() if k not in ("rows", "cols")}).logits
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=1e-4, atol=1e-5)


def test_encoder_and_language_model_become_a_model_that_answers(
    tmp_path: Path, tiny_config: Callable[..., Any], tokenizer: Any, make_image: Callable[..., Any]
) -> None:
    config = tiny_config()
    text = {name: getattr(config.text_config, name) for name in TEXT}
    vision = {name: getattr(config.vision_config, name) for name in VISION}
    tokenizer.save_pretrained(tmp_path / "text")
    size = len(tokenizer)
    llama = LlamaConfig(**text, vocab_size=size, pad_token_id=0)
    AutoModelForCausalLM.from_config(llama).save_pretrained(tmp_path / "text")
    AutoModel.from_config(CLIPVisionConfig(**vision)).save_pretrained(tmp_path / "vision")
    output = tmp_path / "sparse"
    features = '{"vision_feature_select_strategy": "default", "pixel_shuffle_factor": 2}'
    command = ["upcycle", str(tmp_path / "text"), "--vision", str(tmp_path / "vision")]
    assert main.main([*command, "--output_dir", str(output), "--connector", features]) == 0
    model = AutoModelForImageTextToText.from_pretrained(output)
    assert model.config.image_token_id in model.generation_config.suppress_tokens
    ask = pipeline(
        "image-text-to-text", model=model, processor=AutoProcessor.from_pretrained(output)
    )
    question = [{"type": "image", "image": make_image(0)}, {"type": "text", "text": "what is it?"}]
    answer = ask(text=[{"role": "user", "content": question}], max_new_tokens=3)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def push(folder: Path, name: str) -> None:
    """In a process whose Hub is the test's."""
    api = HfApi()
    api.create_repo(name)
    api.upload_folder(repo_id=name, folder_path=folder)


def test_vlmoe_is_taken_where_native_cannot_and_the_report_says_why(
    dense_folder: Path, tmp_path: Path
) -> None:
    for name, options, reason in (
        ("bias", {"router_bias_update_rate": 0.01}, "`fields` holds 'router_bias_update_rate'"),
        ("layers", {"sparse_layers": [1]}, "`sparse_layers` is [1]"),
    ):
        report = upcycle(dense_folder, tmp_path / name, num_experts=4, **options).report
        assert report.target == "vlmoe" and reason in (report.not_native or "")
        assert reason in report.table()
        with pytest.raises(ValueError, match=name.split("_")[-1]):
            upcycle(dense_folder, tmp_path / "none", target="native", num_experts=4, **options)


def test_a_target_that_is_asked_for_is_the_one(dense_folder: Path, tmp_path: Path) -> None:
    report = upcycle(dense_folder, tmp_path / "own", target="vlmoe", num_experts=4).report
    assert report.target == "vlmoe" and report.not_native is None
    VLMoEForConditionalGeneration.from_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="`target` is 'dense'; allowed: native, vlmoe"):
        upcycle(dense_folder, tmp_path / "none", target="dense")
    with pytest.raises(ValueError, match="joined to a language model has no class"):
        upcycle(dense_folder, tmp_path / "none", target="native", vision=dense_folder)


def test_a_model_of_the_hub_is_a_source_and_the_card_names_it(
    dense_folder: Path, tmp_path: Path, hub: Any, hub_process: Callable[..., Any]
) -> None:
    hub_process(push, dense_folder, "tester/dense")
    output = tmp_path / "sparse"
    code, printed, error = hub_process(
        *(command, "upcycle", "tester/dense", "--output_dir", str(output)),
        *("--num_experts", "3", "--target", "vlmoe"),
    )
    assert code == 0, error
    assert "tester/dense (idefics3)" in printed
    card = ModelCard.load(output / "README.md")
    assert card.data.base_model == ["tester/dense"] and card.data.license == "mit"
    assert UpcyclingReport.load(output).error <= 1e-5
    VLMoEProcessor.from_pretrained(output)


def test_a_model_of_the_hub_is_the_source_of_a_native_one(
    dense_folder: Path, tmp_path: Path, hub: Any, hub_process: Callable[..., Any]
) -> None:
    hub_process(push, dense_folder, "tester/dense-of-native")
    output = tmp_path / "sparse"
    asked = ("upcycle", "tester/dense-of-native", "--output_dir", str(output))
    code, _, error = hub_process(command, *asked, "--num_experts", "3", "--target", "native")
    assert code == 0, error
    report = UpcyclingReport.load(output)
    assert report.target == "native" and report.error <= 1e-5 and report.sample["images"] == 3
    card = ModelCard.load(output / "README.md")
    assert card.data.base_model == ["tester/dense-of-native"] and card.data.license == "mit"
    for name in ("tokenizer.json", "processor_config.json", "chat_template.jinja"):
        assert (output / name).read_bytes() == (dense_folder / name).read_bytes(), name
    assert AutoModelForImageTextToText.from_pretrained(output).config.model_type == "idefics3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output_dir"),
        (["--sparse_layers", "some"], "--sparse_layers is 'some'; allowed: all, second_half"),
        (["--fields", "{"], "'--fields': not valid JSON"),
        (["--fields", "[1]"], "'--fields': a JSON object"),
        (["--fields", '{"norm_topk_prob": false}'], "'norm_topk_prob', which is an option"),
        (["--fields.norm_topk_prob", "false"], "'norm_topk_prob', which is an option"),
        (["--norm_topk_prob", "false"], "--norm_topk_prob is False with 8 experts"),
        (["--num_experts_per_tok", "1"], "--norm_topk_prob is not given. Choose: True keeps"),
        (["--connector.pixel_shuffle_factor", "2"], "--connector is for --vision"),
        (["--connector", '{"pixel_shuffle_factor": 2}'], "--connector is for --vision"),
        (["--expert_split", "3"], "allowed: divisors of the dense model's"),
        (["--num_experts", "many"], "--num_experts"),
    ],
)
def test_a_wrong_option_is_one_line(
    arguments: list[str],
    message: str,
    dense_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = ["--output_dir", str(tmp_path / "sparse")] if arguments else []
    assert main.main(["upcycle", str(dense_folder), *output, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vlmoe upcycle: error: ") and message in error
    assert not (tmp_path / "sparse").exists()


def test_a_model_that_is_not_whole_is_not_converted(
    dense_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((dense_folder / "config.json").read_text())
    config["text_config"]["mlp_bias"] = True
    (dense_folder / "config.json").write_text(json.dumps(config))
    command = ["upcycle", str(dense_folder), "--output_dir", str(tmp_path / "sparse")]
    assert main.main(command) == 2
    assert "9 missing (model.text_model.layers.0.mlp.down_proj.bias" in capsys.readouterr().err
    assert main.main(["upcycle", str(tmp_path / "nothing"), *command[2:]]) == 2
    assert "nothing" in capsys.readouterr().err


def test_from_python_the_folder_holds_what_from_dense_makes(
    dense_folder: Path, tmp_path: Path
) -> None:
    options = {"num_experts": 4, "expert_split": 2, "sparse_layers": range(1), "router_std": 1.0}
    result = upcycle(
        dense_folder, tmp_path / "sparse", target="vlmoe", **options, router_aux_loss_coef=0.25
    )
    assert result.folder == tmp_path / "sparse" and result.report.error <= 1e-5
    assert result.report == UpcyclingReport.load(result.folder)
    model = VLMoEForConditionalGeneration.from_pretrained(result.folder)
    assert model.config.text_config.router_aux_loss_coef == 0.25
    VLMoEProcessor.from_pretrained(result.folder)
    expected = VLMoEForConditionalGeneration.from_dense(dense_folder, **options).state_dict()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in model.state_dict().items())
    for target, wrong, message in (
        (result.folder, {}, "is not an empty folder"),
        (tmp_path / "other", {"connector": {"pixel_shuffle_factor": 2}}, "is for `vision`"),
        (tmp_path / "other", {"expert_init": "copies"}, "expert_init is 'copies'"),
        (tmp_path / "other", {"expert_splits": 2}, "did you mean 'expert_split'"),
        (tmp_path / "other", {"fields": {"seed": 1}}, "'seed', which is an option"),
    ):
        with pytest.raises(ValueError, match=message):
            upcycle(dense_folder, target, **wrong)
        assert not (tmp_path / "other").exists()
