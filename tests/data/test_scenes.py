import io
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from vlmoe.data.loading import split_names
from vlmoe.data.scenes import EMOJI, SIDE, SPLITS, scene, scene_rows
from vlmoe.tasks import load_rows
from vlmoe.tasks.boxes import parse_boxes, pixel_corners


def pixels(row):
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])), int)


@pytest.mark.parametrize("emoji", [False, True])
def test_boxes_hold_exactly_the_pixels_that_are_not_ground(emoji):
    for number in range(150):
        row = scene("train", number, emoji=emoji)
        shown = pixels(row)
        assert shown.shape == (SIDE, SIDE, 3)
        free = np.ones((SIDE, SIDE), bool)
        for x, y, width, height in row["objects"]["bbox"]:
            free[y : y + height, x : x + width] = False
        ground = shown[free][0]
        drawn = (shown != ground).any(-1)
        assert not drawn[free].any()
        for x, y, width, height in row["objects"]["bbox"]:
            inside = drawn[y : y + height, x : x + width]
            assert inside.shape == (height, width)
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any()


@pytest.mark.parametrize("emoji", [False, True])
def test_objects_are_one_to_three_apart_and_from_left_to_right(emoji):
    counts, names = [0] * 4, set()
    for number in range(300):
        row = scene("test", number, emoji=emoji)
        boxes, categories = row["objects"]["bbox"], row["objects"]["category"]
        counts[len(boxes)] += 1
        names |= set(categories)
        assert boxes == sorted(boxes)
        for (x, y, w, h), (left, top, across, down) in combinations(boxes, 2):
            assert x + w < left or left + across < x or y + h < top or top + down < y
        for x, y, w, h in boxes:
            assert 0 <= x <= x + w <= SIDE and 0 <= y <= y + h <= SIDE and 13 <= max(w, h) <= 26
        articles = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in categories]
        assert row["caption"] == ", then ".join(articles)
    assert counts[0] == 0 and min(counts[1:]) > 70
    assert len(names) == 24
    assert not emoji or names == set(EMOJI)


def test_a_scene_follows_from_split_and_number_and_splits_share_none():
    assert scene("train", 5) == scene("train", 5)
    seen = [scene(split, number)["image"]["bytes"] for split in SPLITS for number in range(100)]
    assert len(set(seen)) == 300


def test_rows_are_those_of_detection_data():
    rows = scene_rows("validation", count=3)
    assert rows.column_names == ["id", "image", "objects", "caption"]
    assert rows[2]["id"] == "scenes/validation/2"
    assert rows[2]["objects"] == scene("validation", 2)["objects"]
    with pytest.raises(ValueError, match=r"no split 'dev'.*train, validation, test"):
        scene_rows("dev")


def test_scenes_are_a_dataset_by_name_for_detection_and_for_captions(monkeypatch):
    monkeypatch.setitem(SPLITS, "test", 4)
    right = [scene("test", number, emoji=True) for number in range(4)]
    rows = load_rows("scenes_emoji", "test", task="object-detection")
    for row, each in zip(rows, right, strict=True):
        found = parse_boxes(row["messages"][0][1]["content"][0]["text"]).objects
        assert [one.label for one in found] == each["objects"]["category"]
        corners = [pixel_corners(one.corners, (SIDE, SIDE)) for one in found]
        boxes = [(x, y, x + w, y + h) for x, y, w, h in each["objects"]["bbox"]]
        assert np.abs(np.array(corners) - boxes).max() <= SIDE / 1000
        assert row["images"] == [each["image"]]
    captions = load_rows("scenes_emoji", "test", task="image-captioning")
    texts = [row["messages"][0][1]["content"][0]["text"] for row in captions]
    assert texts == [each["caption"] for each in right]
    assert load_rows("scenes", "test", task="object-detection", limit=1)[0]["id"] == "scenes/test/0"
    assert split_names("scenes") == ["train", "validation", "test"]
