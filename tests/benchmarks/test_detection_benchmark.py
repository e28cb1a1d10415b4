"""The detection benchmark's model sees every patch and writes every answer of its scenes."""

import json

import detection
import pytest
from detection import Recipe, detection_rows, new_model

from vlmoe.data.collator import VLMoECollator


@pytest.mark.parametrize("scenes", ["scenes", "scenes_emoji"])
def test_answers_are_known_tokens_one_a_coordinate_beside_64_image_tokens(scenes):
    recipe = Recipe(scenes=scenes)
    model, processor = new_model(recipe)
    rows = detection_rows(recipe, "validation", 20)
    tokenizer = processor.tokenizer
    batch = VLMoECollator(processor)([rows[number] for number in range(20)])
    is_image = batch["input_ids"] == model.config.image_token_id
    assert is_image.sum(1).tolist() == [64] * 20
    assert not (batch["input_ids"] == tokenizer.unk_token_id).any()
    for row, labels in zip(rows, batch["labels"], strict=True):
        answer = row["messages"][0][1]["content"][0]["text"]
        learned = labels[labels != -100]
        assert tokenizer.decode(learned, skip_special_tokens=True) == answer
        numbers = [each for each in tokenizer.convert_ids_to_tokens(learned) if each.isdigit()]
        written = [number for each in json.loads(answer) for number in each["bbox_2d"]]
        assert [int(each) for each in numbers] == written


@pytest.mark.slow
def test_a_finished_training_is_not_repeated(tmp_path, monkeypatch):
    arguments = ["--steps", "2", "--test_scenes", "2", "--output_dir", str(tmp_path)]
    arguments += ["--results", str(tmp_path / "detection.json")]
    monkeypatch.setattr("sys.argv", ["detection.py", *arguments])
    detection.main()
    first = json.loads((tmp_path / "detection.json").read_text())
    run = first["runs"]["scenes"]["0"]
    assert set(run["figures"]) > {"ap", "ap50", "unparsable", "precision50", "recall50"}
    monkeypatch.setattr(detection, "VLMoETrainer", None)
    detection.main()
    again = json.loads((tmp_path / "detection.json").read_text())
    assert again["runs"]["scenes"]["0"]["figures"] == run["figures"]
