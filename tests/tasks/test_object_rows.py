import numpy as np
import pytest
from builders import picture
from datasets import ClassLabel, Dataset, Features, Image, List, Value

from vlmoe.data.rows import as_rows
from vlmoe.tasks import load_rows, task_reader
from vlmoe.tasks.boxes import parse_boxes, pixel_corners

READER = task_reader("object-detection", "Find them.")
ANSWER = (
    '[{"bbox_2d": [0, 0, 500, 1000], "label": "dog"}, '
    '{"bbox_2d": [250, 500, 750, 1000], "label": "cat"}]'
)
BOXES, NAMES = [[10, 10, 20, 10], [0, 0, 20, 20]], ["cat", "dog"]


def converted(objects, images=None, **columns):
    images = {"image": picture(0, (40, 20))} if images is None else images
    (row,) = as_rows([{**images, "objects": objects, **columns}], "rows", READER)
    return row


@pytest.mark.parametrize(
    "objects",
    [
        {"bbox": BOXES, "category": NAMES},
        {"bbox": BOXES, "categories": NAMES, "area": [1, 2], "id": [3, 4]},
        {"bbox": [np.array(box, float).tolist() for box in BOXES], "labels": NAMES},
        {"bbox": np.array(BOXES), "category": np.array(NAMES)},
        [{"bbox": box, "category": name} for box, name in zip(BOXES, NAMES, strict=True)],
    ],
)
def test_objects_become_a_question_and_boxes_as_text(objects):
    row = converted(objects, caption="ignored here")
    shown = {"type": "image", "text": None}
    assert row["messages"] == [
        [
            {"role": "user", "content": [shown, {"type": "text", "text": "Find them."}]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ]
    ]
    back = [pixel_corners(each.corners, (40, 20)) for each in parse_boxes(ANSWER).objects]
    assert back == [(0, 0, 20, 20), (10, 10, 30, 20)]


def answers(rows):
    return [row["messages"][0][1]["content"][0]["text"] for row in rows]


def test_a_dataset_of_the_hubs_form_is_read_with_the_names_of_its_classes(tmp_path):
    features = Features(
        {
            "image": Image(),
            "objects": {
                "bbox": List(List(Value("float32"), length=4)),
                "category": List(ClassLabel(names=["cat", "dog"])),
            },
        }
    )
    rows = [
        {"image": picture(0, (40, 20)), "objects": {"bbox": BOXES, "category": [0, 1]}},
        {"image": picture(0, (40, 20)), "objects": {"bbox": [], "category": []}},
    ]
    dataset = Dataset.from_list(rows, features=features)
    assert answers(as_rows(dataset, "rows", READER)) == [ANSWER, "[]"]
    dataset.save_to_disk(tmp_path / "data")
    loaded = load_rows(str(tmp_path / "data"), task="object-detection")
    assert answers(loaded) == [ANSWER, "[]"]
    question = loaded[0]["messages"][0][0]["content"]
    assert question[0]["type"] == "image" and question[1]["text"]


def test_boxes_are_in_the_picture_as_it_is_shown():
    turned = picture(0, (20, 40))
    turned.getexif()[0x0112] = 6  # shown with width and height exchanged: 40 x 20
    import io

    file = io.BytesIO()
    turned.save(file, format="JPEG", exif=turned.getexif())
    row = converted({"bbox": BOXES, "category": NAMES}, {"image": file.getvalue()})
    assert answers([row]) == [ANSWER]


@pytest.mark.parametrize(
    ("objects", "facts"),
    [
        (
            {"bbox": [[0, 0, 9, 9], [35, 0, 9, 9]], "category": NAMES},
            ["box 1", "4 pixels", "40 x 20"],
        ),
        ({"bbox": [[0, 0, 9, -2]], "category": ["cat"]}, ["box 0", "height -2"]),
        ({"bbox": [[0, 0, 0, 2]], "category": ["cat"]}, ["box 0", "width 0"]),
        ({"bbox": BOXES, "category": ["cat", None]}, ["box 1", "category"]),
        ({"bbox": BOXES, "category": ["cat"]}, ["2 boxes and 1 categories"]),
        ({"bbox": BOXES}, ["2 boxes and 0 categories"]),
        ({"boxes": BOXES, "category": NAMES}, ["boxes, category", "`bbox`"]),
        ({"bbox": BOXES, "category": NAMES, "label": NAMES}, ["category, label"]),
        ([{"bbox": BOXES[0]}], ["box 0", "category"]),
        ([BOXES[0]], ["`objects`", "`bbox`"]),
        (None, ["`objects` is None"]),
    ],
)
def test_bad_objects_are_errors_that_name_row_and_box(objects, facts):
    with pytest.raises(ValueError, match=r"rows\[0\]") as error:
        converted(objects)
    assert all(fact in str(error.value) for fact in facts)


def test_a_row_needs_one_picture_whose_size_can_be_read():
    objects = {"bbox": BOXES, "category": NAMES}
    with pytest.raises(ValueError, match=r"rows\[0\].* has 2 pictures"):
        converted(objects, {"images": [picture(0, (40, 20))] * 2})
    with pytest.raises(ValueError, match=r"rows\[0\].*size"):
        converted(objects, {"image": b"no picture"})


def test_altered_copies_are_refused(tmp_path):
    rows = [{"image": picture(0, (40, 20)), "objects": {"bbox": BOXES, "category": NAMES}}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=r"altered_copies=2 .*object-detection"):
        load_rows(str(tmp_path / "data"), task="object-detection", altered_copies=2)
