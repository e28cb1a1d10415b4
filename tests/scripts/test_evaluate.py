"""`vlmoe evaluate`: a table, a JSON file, one-line errors."""

import json
import shutil
from pathlib import Path

import pytest
from builders import picture
from huggingface_hub import ModelCard
from PIL import Image

from vlmoe import embedding_model, evaluate_retrieval
from vlmoe_cli import main


def test_the_scores_are_printed_and_written(
    tmp_path: Path, saved_model: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, predictions = tmp_path / "new" / "scores.json", tmp_path / "predictions.json"
    where = ["--model", str(saved_model), "--dataset", str(data_folder), "--split", "test"]
    files = ["--output", str(output), "--save_predictions", str(predictions)]
    more = ["--batch_size", "4", "--max_new_tokens", "3", "--device", "cpu", "--max_rows", "2"]
    assert main.main(["evaluate", *where, *files, *more]) == 0

    printed = capsys.readouterr()
    scores = json.loads(output.read_text())
    records = json.loads(predictions.read_text())
    assert scores["count_by_type"] == {"color": 2, "yes/no": 2}
    assert scores["questions"] == len(records) == 4
    assert scores["exact_match"] == sum(record["correct"] for record in records) / 4
    assert scores["options"]["batch_size"] == 4 and "predictions" not in scores
    for word in ("color", "yes/no", "all", "exact match", f"Written to {output}"):
        assert word in printed.out
    assert "answering" in printed.err


def test_the_results_lie_in_the_model_folder_by_default(
    tmp_path: Path, saved_model: Path, data_folder: Path
) -> None:
    for file in saved_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "evaluate.yaml"
    config.write_text(f"model: {tmp_path}\ndataset: {data_folder}\nmax_rows: 1\nwithout-images: on")
    more = ["--max_new_tokens", "2", "--dtype", "bfloat16", "--experts_implementation", "eager"]
    assert main.main(["evaluate", "--config", str(config), *more]) == 0
    scores = json.loads((tmp_path / "evaluate_results.json").read_text())
    assert scores["questions"] == 2 and scores["options"]["without_images"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "dev"], "dev"),
        (["--batch_size", "0"], "'--batch_size': must be greater than or equal to 1, got '0'"),
        (["--max_length", "3"], "more than max_length=3"),
        (["--device", "warp"], "--device 'warp' cannot be used"),
        (["--dtype", "int8"], "--dtype 'int8' is no number type"),
        (["--save_predict", "x"], "--save_predictions"),
    ],
)
def test_wrong_options_are_named_and_nothing_is_written(
    arguments: list[str],
    message: str,
    saved_model: Path,
    data_folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    where = ["--model", str(saved_model), "--dataset", str(data_folder)]
    output = ["--output", str(tmp_path / "scores.json")]
    assert main.main(["evaluate", *where, *output, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vlmoe evaluate: error: ") and message in error
    assert list(tmp_path.iterdir()) == []


def test_a_task_is_measured_by_its_metrics_and_its_labels(
    tmp_path: Path, saved_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(saved_model, model)
    for label in ("red", "blue"):
        for number in range(2):
            (data / "test" / label).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), label).save(data / "test" / label / f"{number}.png")
    where = ["evaluate", "--model", str(model), "--dataset", str(data), "--device", "cpu"]
    where += ["--task", "image-classification", "--prompt", "what?"]
    answers = tmp_path / "answers.json"
    more = ["--labels", "red,blue", "--labels", "a circle", "--save_predictions", str(answers)]
    assert main.main([*where, *more]) == 0
    results = json.loads((model / "evaluate_results.json").read_text())
    records = json.loads(answers.read_text())
    named = ["accuracy", "macro_f1", "likelihood_accuracy", "likelihood_macro_f1"]
    assert list(results["metrics"]) == named
    likely = [each["label"] == each["reference"] for each in records]
    assert results["metrics"]["likelihood_accuracy"] == sum(likely) / 4
    assert results["metrics"]["accuracy"] == results["exact_match"]
    assert {each["label"] for each in records} <= {"red", "blue", "a circle"}
    assert (results["task"], results["options"]["prompt"]) == ("image-classification", "what?")
    printed = capsys.readouterr().out
    assert all(name in printed for name in named)
    card = ModelCard.load(model / "README.md")
    assert "| likelihood\\_macro\\_f1 |" in card.text or "| likelihood_macro_f1 |" in card.text
    values = {each.metric_name: each.metric_value for each in card.data.eval_results}
    assert values["likelihood_accuracy"] == results["metrics"]["likelihood_accuracy"]
    assert card.data.eval_results[-1].task_type == "image-classification"
    assert set(card.data.metrics) == {"exact_match", *named}

    assert main.main([*where, "--labels", "blue,rot"]) == 2
    error = capsys.readouterr().err
    assert "row 'test/red/0.png'" in error and "'red' is none of the labels blue, rot" in error
    assert main.main([*where[:-1], "what?", "--labels", "blue,"]) == 2
    assert "the text is empty" in capsys.readouterr().err


@pytest.fixture
def pairs_folder(tmp_path: Path) -> Path:
    """Four images; the second has two captions."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    captions = [["a red circle"], ["blue", "a square"], ["yes"], ["no"]]
    rows = []
    for number, several in enumerate(captions):
        picture(number).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "captions": several})
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_retrieval_is_measured_and_told_in_the_card(
    tmp_path: Path, saved_model: Path, pairs_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(saved_model, model)
    where = ["--model", str(model), "--dataset", str(pairs_folder)]
    task = ["--task", "image-text-retrieval", "--batch_size", "2"]
    assert main.main(["evaluate", *where, *task]) == 0
    printed = capsys.readouterr().out
    assert "text to image        5" in printed and "image to text        4" in printed
    results = json.loads((model / "evaluate_results.json").read_text())
    images = [picture(number) for number in range(4)]
    captions = ["a red circle", ["blue", "a square"], "yes", "no"]
    found = evaluate_retrieval(embedding_model(model), images, captions)
    assert results["metrics"] == pytest.approx(found.as_dict())
    assert results["exact_match"] is None and results["questions"] == 4
    card = (model / "README.md").read_text()
    assert "task image-text-retrieval on 4 images of" in card and "text_to_image_recall@1" in card
    assert "Exact match (ignoring" not in card
    found_metrics = {each.metric_name for each in ModelCard(card).data.eval_results}
    assert found_metrics == set(found.as_dict())
    for wrong, named in (
        (["--max_new_tokens", "3"], "leave out --max_new_tokens"),
        (["--without_images"], "leave out --without_images"),
        (["--dtype", "bfloat16", "--labels", "a,b"], "leave out --labels, --dtype"),
    ):
        assert main.main(["evaluate", *where, *task, *wrong]) != 0
        assert named in capsys.readouterr().err
