import json
import random

import pytest

from vlmoe.tasks.boxes import boxes_as_text, labeled_box, parse_boxes, pixel_corners

CAT = '{"bbox_2d": [10, 20, 300, 400], "label": "cat"}'
DOG = '{"bbox_2d": [500, 0, 1000, 1000], "label": "big dog"}'

INTERNVL = (
    "<ref>cat</ref><box>[[10, 20, 300, 400]]</box><ref>big dog</ref><box>[[500,0,1000,1000]]</box>"
)


def read(text):
    parsed = parse_boxes(text)
    return [(each.label, each.corners) for each in parsed.objects], parsed.is_whole


BOTH = [("cat", (10, 20, 300, 400)), ("big dog", (500, 0, 1000, 1000))]


def test_what_is_written_is_qwens_json_from_left_to_right():
    right = labeled_box("big dog", [320, 0, 320, 480], (640, 480))
    left = labeled_box(" cat ", [6.4, 9.6, 185.6, 182.4], (640, 480))
    text = boxes_as_text([right, left])
    assert text == f"[{CAT}, {DOG}]"
    assert json.loads(text)[1] == {"bbox_2d": [500, 0, 1000, 1000], "label": "big dog"}
    assert boxes_as_text([]) == "[]"
    assert boxes_as_text([labeled_box("é", [0, 0, 4, 4], (8, 8))]).endswith('"label": "é"}]')


def test_boxes_come_back_within_a_thousandth_of_the_side():
    draw = random.Random(0)
    for _ in range(300):
        size = draw.randint(2, 5000), draw.randint(2, 5000)
        x, y = draw.uniform(0, size[0] - 1), draw.uniform(0, size[1] - 1)
        given = [x, y, draw.uniform(1e-3, size[0] - x), draw.uniform(1e-3, size[1] - y)]
        (back,) = parse_boxes(boxes_as_text([labeled_box("a", given, size)])).objects
        pixels = pixel_corners(back.corners, size)
        expected = (x, y, x + given[2], y + given[3])
        for axis, (one, other) in enumerate(zip(pixels, expected, strict=True)):
            assert abs(one - other) <= size[axis % 2] / 1000 + 1e-9
        assert pixels[0] < pixels[2] and pixels[1] < pixels[3]


@pytest.mark.parametrize(
    "text",
    [
        f"[{CAT}, {DOG}]",
        f"[\n\t{CAT},\n\t{DOG}\n]",
        f"```json\n[{CAT}, {DOG}]\n```",
        f"There are two: [{CAT}, {DOG}]",
        INTERNVL,
        "<ref>cat</ref><box>[[10, 20, 300, 400]]</box>\nand <ref>big dog</ref> "
        "<box>[[500, 0, 1000, 1000]]</box>.",
        "cat[[10, 20, 300, 400]]\nbig dog[[500, 0, 1000, 1000]]",
    ],
)
def test_both_forms_are_read(text):
    assert read(text) == (BOTH, True)


def test_internvls_boxes_of_one_label_are_objects():
    found, is_whole = read("<ref>a, b</ref><box>[[1, 2, 3, 4], [5.5, 6, 7, 8]]</box>")
    assert found == [("a, b", (1, 2, 3, 4)), ("a, b", (5.5, 6, 7, 8))] and is_whole


def test_an_answer_cut_anywhere_gives_the_objects_before_and_is_not_whole():
    text = f"[{CAT}, {DOG}]"
    for end in range(len(text)):
        found, is_whole = read(text[:end])
        assert not is_whole
        assert found == BOTH[: (end > len(CAT)) + (end > len(CAT) + len(DOG) + 2)]
    for end in range(INTERNVL.index("<ref>big") + 1, INTERNVL.rindex("]")):
        found, is_whole = read(INTERNVL[:end])
        assert found == BOTH[:1] and not is_whole


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("no objects", 0),
        ("[", 0),
        ("[" * 100_000, 0),
        ('[{"bbox_2d": [1, 2, 3], "label": "cat"}]', 0),
        ('[{"bbox_2d": [1, 2, NaN, 4], "label": "cat"}]', 0),
        ('[{"bbox_2d": [1, 2, true, 4], "label": "cat"}]', 0),
        ('[{"bbox_2d": [1, 2, 3, 4]}]', 0),
        ('[{"bbox_2d": [1, 2, 3, 4], "label": ""}]', 0),
        (f'[{CAT}, "dog"]', 1),
        (f"[{CAT} {DOG}]", 2),
        (f"[{CAT}, {DOG}]]", 2),
        ('[{"label": "cat"}]', 0),
        ("[[1, 2, 3, 4]]", 0),
        ("<ref>cat</ref><box>[[1, 2, 3]]</box>", 0),
    ],
)
def test_what_is_no_list_of_boxes_is_unparsable(text, count):
    found, is_whole = read(text)
    assert len(found) == count and not is_whole


def test_an_empty_list_is_an_answer():
    assert read("[]") == ([], True)
    assert read("```json\n[]\n```") == ([], True)


def test_numbers_beyond_the_picture_are_cut_and_corners_out_of_order_cover_nothing():
    huge = "9" * 400
    found, is_whole = read(f'[{{"bbox_2d": [-5, 400, {huge}, 300], "label": "a"}}]')
    assert found == [("a", (0, 400, 1000, 400))] and is_whole


def test_braces_and_quotes_in_labels_are_kept():
    label = 'a "{x}" \\ ]'
    text = boxes_as_text([labeled_box(label, [0, 0, 4, 8], (8, 8))])
    assert read(text) == ([(label, (0, 0, 500, 1000))], True)


def test_the_span_of_an_object_is_its_text():
    text = f"```json\n[{CAT}, {DOG}]\n```"
    assert [text[slice(*each.span)] for each in parse_boxes(text).objects] == [CAT, DOG]


@pytest.mark.parametrize(
    ("bbox", "facts"),
    [
        ([10, 10, 0, 5], ["width 0", "[10, 10, 0, 5]"]),
        ([10, 10, 5, -1], ["height -1"]),
        ([60, 10, 10, 5], ["6 pixels", "64 x 48"]),
        ([-3, 10, 10, 5], ["3 pixels"]),
        ([0, 40, 10, 20], ["12 pixels"]),
        ([0, 0, 5], ["[x, y, width, height]"]),
        ([0, 0, float("nan"), 5], ["[x, y, width, height]"]),
        (None, ["None"]),
        ("abcd", ["abcd"]),
    ],
)
def test_a_bad_box_is_an_error_that_names_it(bbox, facts):
    with pytest.raises(ValueError, match="row 7, box 2") as error:
        labeled_box("cat", bbox, (64, 48), "row 7, box 2")
    assert all(fact in str(error.value) for fact in facts)


@pytest.mark.parametrize("label", [None, "", "  ", 3])
def test_a_box_without_a_category_is_an_error(label):
    with pytest.raises(ValueError, match="row 7, box 2 has no category"):
        labeled_box(label, [0, 0, 5, 5], (64, 48), "row 7, box 2")


def test_a_box_a_pixel_beyond_the_edge_is_cut():
    assert labeled_box("a", [60, 0, 5, 48.5], (64, 48)).corners == (938, 0, 1000, 1000)
