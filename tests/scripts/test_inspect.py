"""`vlmoe inspect`: a page, its pictures and numbers; one-line errors before anything is loaded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe.routing.inspection.inspect import short_name
from vlmoe.routing.inspection.page import percent
from vlmoe_cli import main

FAST = ["--max_new_tokens", "3", "--device", "cpu"]


def test_a_dataset_gives_a_page_with_pictures_and_numbers(
    tmp_path: Path, saved_model: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "out"
    where = ["--model", str(saved_model), "--dataset", str(data_folder), "--batch_size", "4"]
    more = ["--before", str(saved_model), "--output_dir", str(output), *FAST]
    assert main.main(["inspect", *where, *more]) == 0
    printed = capsys.readouterr()
    assert f"Written to {output / 'inspection.html'}" in printed.out and "routing" in printed.err
    assert printed.out.split()[0] == "layer" and "type bits" in printed.out

    numbers = json.loads((output / "inspection.json").read_text())
    assert numbers["layers"] == [0, 1, 2] and numbers["num_experts_per_tok"] == 2
    assert numbers["question_types"]["types"] == ["color", "yes/no"]
    assert numbers["question_types"]["questions"] == [3, 3]
    assert [prompt["question_type"] for prompt in numbers["prompts"]] == ["color", "yes/no"]
    for kind in ("image", "text", "all"):
        assert numbers["before"]["changed"][kind]["changed"] == [0.0] * 3, "the same model"
    files = {path.name for path in output.iterdir()}
    assert files == {
        *("inspection.html", "inspection.json", "load.png", "before_after.png"),
        *("question_types_text_tokens.png", "specialization.png"),
        *("question_1_image_1.png", "question_2_image_1.png"),
    } | (files & {"question_types_image_tokens.png"})
    page = (output / "inspection.html").read_text()
    assert page.count("data:image/png;base64") == len(files) - 2
    assert str(tmp_path) not in page and str(data_folder) not in page, "paths are private"


def test_experts_of_tower_and_connector_have_pictures_and_sentences(
    tmp_path: Path,
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
    saved_model: Path,
    data_folder: Path,
) -> None:
    folder, output = tmp_path / "model", tmp_path / "out"
    processor = VLMoEProcessor.from_pretrained(saved_model)
    text = {"vocab_size": len(processor.tokenizer)}
    tiny_model(text=text, vision_num_experts=3, projector_num_experts=5).save_pretrained(folder)
    processor.save_pretrained(folder)
    where = ["--model", str(folder), "--dataset", str(data_folder), "--output_dir", str(output)]
    assert main.main(["inspect", *where, *FAST]) == 0
    page, numbers = ((output / name).read_text() for name in ("inspection.html", "inspection.json"))
    load = json.loads(numbers)["expert_load"]["vision"]
    for place, experts, tokens in (("tower", 3, "patches"), ("connector", 5, "image tokens")):
        shares = load[place]["image_share"][0]
        assert len(shares) == experts and (output / f"load_{place}.png").exists()
        busiest = shares.index(max(shares))
        told = f"expert {busiest} gets {percent(max(shares))} of what {tokens} choose"
        assert f"In layer 0 {told}" in page


def test_a_question_about_an_image_in_tiles_and_one_without_an_image(
    tmp_path: Path, saved_model: Path, make_image: Callable[..., Image.Image]
) -> None:
    folder, output = tmp_path / "tiled", tmp_path / "out"
    shutil.copytree(saved_model, folder)
    tokenizer = VLMoEProcessor.from_pretrained(saved_model).tokenizer
    config = VLMoEConfig.from_pretrained(saved_model)
    VLMoEProcessor.for_config(config, tokenizer, tiling=True).save_pretrained(folder)
    make_image(size=(40, 20)).save(tmp_path / "wide.png")
    image = ["--image", str(tmp_path / "wide.png")]
    where = ["--model", str(folder), "--output_dir", str(output), *FAST]
    assert main.main(["inspect", *where, *image, "what <b>color</b> is it?"]) == 0
    page = (output / "inspection.html").read_text()
    assert "cut this image into 2 x 3 tiles" in page and page.count("image (4 tokens)") == 7 * 3
    assert "what &lt;b&gt;color" in page and "How the work is shared" not in page
    numbers = json.loads((output / "inspection.json").read_text())
    [prompt] = numbers["prompts"]
    assert sum(token["is_image"] for token in prompt["tokens"]) == 7 * 4
    assert numbers["expert_load"] is None and numbers["before"] is None

    alone = ["--model", str(folder), "--output_dir", str(tmp_path / "text"), *FAST]
    assert main.main(["inspect", *alone, "is it red?"]) == 0
    assert not list((tmp_path / "text").glob("*.png"))


def test_data_without_types_leave_the_section_out(
    tmp_path: Path, saved_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "is it red?"}, {"role": "assistant", "content": "yes"}]
    rows = [{"messages": turns}, {"messages": turns}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    where = ["--model", str(saved_model), "--dataset", str(tmp_path / "test.jsonl")]
    assert main.main(["inspect", *where, "--output_dir", str(tmp_path / "out"), *FAST]) == 0
    assert "these data name no types" in (tmp_path / "out" / "inspection.html").read_text()
    assert "type bits" not in capsys.readouterr().out
    numbers = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert len(numbers["prompts"]) == 2 and numbers["question_types"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing to inspect: give data (rows, --dataset) or a question"),
        (["--image", "x.png", "--dataset", "DATA"], "An image goes with a question"),
        (["--image", "nowhere.png", "what?"], "There is no image file nowhere.png"),
        (["--before", "MODEL", "what?"], "--before compares two models on data"),
        (["--before", "./nowhere", "--dataset", "DATA"], "There is no model folder ./nowhere"),
        (["--dataset", "DATA", "--split", "dev"], "no split 'dev'"),
        (
            ["--dataset", "DATA", "--max_rows", "0"],
            "'--max_rows': must be greater than or equal to 1, got '0'",
        ),
        (
            ["--dataset", "DATA", "--batch_size", "0"],
            "'--batch_size': must be greater than or equal to 1, got '0'",
        ),
        (["--datset", "DATA"], "--dataset"),
        (["--dataset", "DATA", "--output_dir", "FILE"], "is a file; name a folder"),
    ],
)
def test_wrong_options_are_named_in_one_line_and_nothing_is_written(
    arguments: list[str],
    message: str,
    saved_model: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    stand_for = {"DATA": str(data_folder), "MODEL": str(saved_model), "FILE": "file"}
    given = [stand_for.get(argument, argument) for argument in arguments]
    assert main.main(["inspect", "--model", str(saved_model), *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vlmoe inspect: error: ") and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_without_experts_is_refused(
    tmp_path: Path,
    saved_model: Path,
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "dense"
    shutil.copytree(saved_model, folder)
    vocabulary = VLMoEConfig.from_pretrained(saved_model).text_config.vocab_size
    dense = tiny_model(text={"vocab_size": vocabulary, "mlp_only_layers": [0, 1, 2]})
    dense.save_pretrained(folder)
    arguments = ["--model", str(folder), "--output_dir", str(tmp_path / "out"), *FAST]
    assert main.main(["inspect", *arguments, "what?"]) == 2
    assert "has no experts" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_models_with_other_experts_are_not_compared(
    tmp_path: Path,
    saved_model: Path,
    data_folder: Path,
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(saved_model, folder)
    vocabulary = VLMoEConfig.from_pretrained(saved_model).text_config.vocab_size
    other = tiny_model(text={"vocab_size": vocabulary, "num_experts": 3})
    other.save_pretrained(folder)
    arguments = ["--model", str(saved_model), "--before", str(folder), "--dataset"]
    arguments += [str(data_folder), "--output_dir", str(tmp_path / "out"), *FAST]
    assert main.main(["inspect", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "layers [0, 1, 2] with 3 experts and layers [0, 1, 2] with 4 experts" in error
    assert not (tmp_path / "out").exists()


def test_the_page_names_a_model_without_its_path() -> None:
    assert short_name("/home/someone/runs/tiny") == "runs/tiny"
    for name in ("user/name", "outputs/demo/model"):
        assert short_name(name) == name
