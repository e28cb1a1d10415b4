"""`vlmoe card`, and the card that `vlmoe evaluate` leaves in a model's folder."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from vlmoe_cli import main


@pytest.fixture
def model(tmp_path: Path, saved_model: Path) -> Path:
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


def test_an_evaluation_is_told_by_the_card(
    model: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--model", str(model), "--dataset", str(data_folder), "--max_new_tokens", "2"]
    assert main.main(["evaluate", *where, "--device", "cpu"]) == 0
    text = (model / "evaluate_results.json").read_text()
    results = json.loads(text)
    assert str(model) not in text and str(data_folder) not in text
    card = ModelCard.load(model / "README.md")
    values = {each.metric_name: each.metric_value for each in card.data.eval_results}
    assert values["exact match"] == results["exact_match"]
    assert values["exact match (color)"] == results["exact_match_by_type"]["color"]
    assert card.data.eval_results[0].dataset_name == data_folder.name
    for layer, load in enumerate(results["expert_load"]["max_over_mean"]):
        assert f"| {layer} | {load:.2f} |" in card.text
    assert (model / "expert_load.png").read_bytes().startswith(b"\x89PNG")

    assert main.main(["evaluate", *where, "--max_rows", "1", "--without_images"]) == 0
    card = ModelCard.load(model / "README.md")
    assert "(without images, first 1 rows)" in card.text and card.data.eval_results is None


def test_the_card_is_written_beside_the_model_or_elsewhere(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cards" / "one"
    assert main.main(["card", str(model), "--repo_id", "user/name", "--license", "mit"]) == 0
    assert f"Written to {model / 'README.md'}." in capsys.readouterr().out
    card = ModelCard.load(model / "README.md")
    assert card.data.license == "mit" and 'model="user/name"' in card.text

    output.mkdir(parents=True)
    (output / "metrics.json").write_text("somebody's")
    copy = ["card", str(model), "--output", str(output)]
    assert main.main(copy) == 2
    assert f"{output} holds metrics.json" in capsys.readouterr().err
    assert (output / "metrics.json").read_text() == "somebody's"
    (output / "metrics.json").unlink()
    assert main.main(copy) == 0
    (output / "metrics.json").write_text("of another model")
    assert main.main(copy) == 0
    kept = {path.name for path in output.iterdir()}
    assert kept == {"README.md", "config.json", "processor_config.json"}


def test_what_cannot_be_done_is_said_in_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "README.md").write_text("# Mine")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([], "Missing argument 'FOLDER'"),
        ([str(tmp_path / "empty")], "holds no config.json"),
        ([str(model)], "was written or changed by hand"),
    ):
        assert main.main(["card", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert (model / "README.md").read_text() == "# Mine"
