"""The benchmark of videos: what its clips are, and that it goes on where it was stopped."""

import json
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import video_order
from PIL import Image
from video_order import EMOJI, as_file, clips, is_test, reversed_frames, rows

from vlmoe.data.collator import VLMoECollator


@pytest.fixture
def pool() -> dict[str, list[Image.Image]]:
    """Two pictures of each name, told apart by their levels."""
    grays = {name: [40 + 15 * number, 46 + 15 * number] for number, name in enumerate(EMOJI)}
    return {
        name: [Image.new("RGB", (72, 72), (level,) * 3) for level in levels]
        for name, levels in grays.items()
    }


def test_no_order_of_a_test_clip_is_in_the_training_clips() -> None:
    train, test = set(clips("train", 3000)), set(clips("test", 500))
    assert not {order for clip in test for order in permutations(clip)} & train
    assert all(is_test(clip) for clip in test) and not any(map(is_test, train))
    assert len(train) > 800 and len(test) > 150
    assert {name for clip in test for name in clip} == set(EMOJI)


def test_the_answer_names_the_frames_in_their_order(pool: dict[str, list[Image.Image]]) -> None:
    for row in rows("test", 20, pool):
        [frames], names = row["videos"], row["messages"][1]["content"].split(", ")
        assert all(frame in pool[name] for frame, name in zip(frames, names, strict=True))
        control = reversed_frames(row)
        assert control["videos"] == [frames[::-1]] and control["messages"] == row["messages"]


def test_files_show_the_same_frames_at_the_same_times(
    pool: dict[str, list[Image.Image]], processor
) -> None:
    row = rows("test", 1, pool)[0]
    parsed = [VLMoECollator(processor).parsed(each, 0) for each in (row, as_file(row))]
    assert parsed[0].conversations == parsed[1].conversations
    for frame, decoded in zip(*(each.images for each in parsed), strict=True):
        difference = np.asarray(frame.image, float) - np.asarray(decoded.image, float)
        assert abs(difference).mean() < 4


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[dict] = []
    monkeypatch.setattr(video_order, "write_result", lambda name, result: results.append(result))
    options = ["--steps", "2", "--blind_steps", "2", "--train", "40", "--test", "4"]
    monkeypatch.setattr(sys, "argv", ["video_order.py", "--output_dir", str(tmp_path), *options])
    video_order.main()
    done = json.loads((tmp_path / "figures.json").read_text())
    monkeypatch.setattr(video_order, "train", None)  # what is done is not done again
    video_order.main()
    assert results[0]["runs"] == results[1]["runs"] == done
    assert done["watching"]["answers"].keys() == {"frames", "reversed frames", "MP4 files"}
