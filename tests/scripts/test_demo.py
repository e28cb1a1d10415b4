"""The demo on a handful of images: every stage runs, and leaves what it promises."""

import json
from pathlib import Path

import pytest

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe_cli import demo

pytest.importorskip("easy_vqa")


@pytest.mark.slow
def test_the_demo_leaves_a_model_its_figures_and_its_numbers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    returned = demo.run(demo.Demo(str(tmp_path), seed=3, max_train_rows=8, max_test_rows=4))

    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(returned))
    right = sum(
        metrics["accuracy_by_type"][kind] * count
        for kind, count in metrics["questions_by_type"].items()
    )
    assert metrics["accuracy"] == pytest.approx(right / metrics["questions"])
    assert set(metrics["baselines"]) == {"majority class", "question only"}
    assert metrics["seed"] == metrics["stages"]["easy_vqa"]["seed"] == 3
    model = VLMoEForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert metrics["parameters"] == model.active_parameters()
    for share in metrics["expert_load"]["all_share"]:
        assert len(share) == model.config.text_config.num_experts
        assert sum(share) == pytest.approx(1)
    VLMoEProcessor.from_pretrained(tmp_path / "model")
    if metrics["example"]:
        assert (tmp_path / "model" / "example.png").is_file()
    for figure in ("answers.png", "training.png", "expert_load.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "capacity.json").exists()  # of whole runs alone
    card = (tmp_path / "model" / "README.md").read_text()
    assert "# vlmoe-tiny-easy-vqa\n" in card and "](expert_load.png)" in card
    assert f"({metrics['questions']:,}) | {metrics['accuracy']:.2%} |" in card
    assert "first 4 rows" in card and "model-index" not in card  # not of the whole test set
    printed = capfd.readouterr().out
    assert "image 0: " in printed and "(truth: " in printed  # by the new process
    assert "question only" in printed and "this model" in printed
