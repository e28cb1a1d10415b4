"""A task's columns become conversations, and columns that do not fit are refused by name."""

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from builders import picture, plain_chat

from vlmoe import TASKS, Task, get_task, load_rows
from vlmoe.data.conversations import IMAGE, parse_row
from vlmoe.data.row_formats import RowReader
from vlmoe.data.rows import as_rows
from vlmoe.tasks import task_reader

CLASS = "What is in the image? Answer with the name of the class."
BOXES = "Find all objects. Answer with their boxes and labels in JSON."
GERMAN = "Translate from English to German:\n"
# task: a row, and the conversations that it means: (parts of the user's turn, answer) of each
ROWS: dict[str, tuple[dict[str, Any], list[tuple[tuple[str | None, ...], str]]]] = {
    "image-captioning": (
        {"image": picture(), "captions": ["a cat", "a tom"]},
        [((IMAGE, "Describe the image."), "a cat"), ((IMAGE, "Describe the image."), "a tom")],
    ),
    "image-classification": ({"image": picture(), "label": "cat"}, [((IMAGE, CLASS), "cat")]),
    "object-detection": (
        {
            "image": picture(size=(100, 50)),
            "objects": {"bbox": [[10, 5, 20, 10]], "category": ["cat"]},
        },
        [((IMAGE, BOXES), '[{"bbox_2d": [100, 100, 300, 300], "label": "cat"}]')],
    ),
    "visual-question-answering": (
        {"image": picture(), "question": "what?", "answer": "cat"},
        [((IMAGE, "what?"), "cat")],
    ),
    "translation": ({"translation": {"en": "cat", "de": "Katze"}}, [((GERMAN, "cat"), "Katze")]),
    "translation_de_to_en": (
        {"translation": {"en": "cat", "de": "Katze"}},
        [((GERMAN.replace("English to German", "German to English"), "Katze"), "cat")],
    ),
    "summarization": (
        {"document": "A cat sat.", "summary": "cat"},
        [(("Summarize the text:\n", "A cat sat."), "cat")],
    ),
    "image-text-retrieval": ({"image": picture(), "text": "a cat"}, [((IMAGE,), "a cat")]),
}


def meant(row: Any) -> list[tuple[tuple[str | None, ...], str]]:
    """The user's parts and the answer of each conversation of a row."""
    conversations = parse_row(row, 0).conversations
    return [(each[0].parts, each[1].text()) for each in conversations]


@pytest.mark.parametrize("task", ROWS)
def test_a_row_of_the_task_becomes_the_conversations_that_it_means(task: str) -> None:
    row, conversations = ROWS[task]
    reader = task_reader(task)
    assert meant(as_rows([row], reader=reader)[0]) == conversations
    rows = datasets.Dataset.from_list([row, row])
    assert [meant(each) for each in as_rows(rows, reader=reader)] == [conversations] * 2


def test_every_task_is_tested_here() -> None:
    assert TASKS.keys() - ROWS.keys() <= {"video-text-to-text", "text-to-image"}  # in other files


@pytest.mark.parametrize("task", TASKS)
def test_rows_with_messages_are_taken_as_they_are(task: str) -> None:
    rows = [{"messages": plain_chat("cat?", "yes"), "id": "0"}]
    assert as_rows(rows, reader=task_reader(task)) == as_rows(rows)
    with pytest.raises(ValueError, match=r"`messages`.*leave out the prompt"):
        as_rows(rows, reader=task_reader(task, "Say:"))


def test_a_prompt_takes_the_place_of_the_tasks_own() -> None:
    def asked(task: str, prompt: str) -> tuple[str | None, ...]:
        return meant(as_rows([ROWS[task][0]], reader=task_reader(task, prompt))[0])[0][0]

    assert asked("image-classification", "Which?") == (IMAGE, "Which?")
    assert asked("translation", "{target}, please:") == ("German, please:\n", "cat")
    assert asked("image-captioning", "") == (IMAGE,)
    assert asked("visual-question-answering", "One word.") == (IMAGE, "what?", "\nOne word.")
    with pytest.raises(ValueError, match="'Which\\?' is for a task"):
        task_reader(None, "Which?")


def test_classes_of_a_dataset_are_called_by_their_names() -> None:
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    given = {"image": [picture(i) for i in range(3)], "label": [1, 0, -1]}
    rows = datasets.Dataset.from_dict(given, features=features)
    reader = task_reader("image-classification")
    assert [meant(each)[0][1] for each in as_rows(rows.select([0, 1]), reader=reader)] == [
        "dog",
        "cat",
    ]
    with pytest.raises(ValueError, match="pets, row 2: the label is -1"):
        as_rows(rows, "pets", reader)
    numbers = rows.cast_column("label", datasets.Value("int64")).select([0])
    assert meant(as_rows(numbers, reader=reader)[0])[0][1] == "1"


def test_folders_named_after_classes_are_a_dataset(tmp_path: Path) -> None:
    for place in ("train/cat", "train/test dog", "test/cat", "test/test dog"):
        (tmp_path / place).mkdir(parents=True)
        picture().save(tmp_path / place / "0.png")
    rows = load_rows(str(tmp_path), "test", task="image-classification")
    assert [meant(each)[0][1] for each in rows] == ["cat", "test dog"]
    assert rows["id"] == ["test/cat/0.png", "test/test dog/0.png"]
    with pytest.raises(ValueError, match=r"fit the task image-classification.*--task image-class"):
        load_rows(str(tmp_path))
    picture().save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="without pictures in folders named after their classes"):
        load_rows(str(tmp_path))


def test_an_image_folder_of_datasets_is_read(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    with open(tmp_path / "metadata.csv", "w", newline="") as opened:
        csv.writer(opened).writerows([["file_name", "label"], ["a.png", "007"]])
    [row] = load_rows(str(tmp_path), task="image-classification", prompt="Who?")
    assert meant(row) == [((IMAGE, "Who?"), "007")]


def test_answers_that_are_json_stay_texts(tmp_path: Path) -> None:
    values = [{"document": d, "summary": s} for d, s in (("1.50", "{}"), ("[1]", "2"), ("a", 3))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, values)))
    rows = load_rows(str(tmp_path), task="summarization")
    assert [(meant(each)[0][0][1], meant(each)[0][1]) for each in rows] == [
        ("1.50", "{}"),
        ("[1]", "2"),
        ("a", "3"),
    ]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("image-captioning", {"captions": []}, r"rows\[1\].*captions is empty"),
        ("image-classification", {"label": None}, r"rows\[1\].*label is None"),
        ("image-classification", {"label": ["a", "b"]}, r"rows\[1\].*label is \['a', 'b'\]"),
        ("image-captioning", {"label": "a"}, r"rows\[1\].* no text or caption or captions.*"
         r"They fit the task image-classification"),
        ("image-captioning", {"text": "a", "caption": "b"}, r"rows\[1\].* both text and caption"),
        ("translation", {"translation": {"en": "a"}}, r"rows\[1\].*two languages.* holds en"),
        ("translation", {"translation": {"en": "a", "de": "b", "fr": "c"}}, "holds en, de, fr"),
        ("translation_en_to_it", {"translation": {"en": "a", "de": "b"}}, "en and it; it holds en"),
        (None, {"captions": ["a"]}, r"rows\[1\].*fit the task image-captioning and the task image-"
         "text-retrieval"),
        (None, {"label": "a", "translation": {}}, "image-classification and the task translation"),
        (None, {"tag": "a"}, r"rows\[1\].* has no `messages`"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_named(
    task: str | None, row: dict[str, Any], message: str
) -> None:
    good = {"messages": plain_chat("a", "b")}
    reader: RowReader = task_reader(task)
    with pytest.raises(ValueError, match=message):
        as_rows([good, {"image": picture(), **row}], reader=reader)


def test_an_unknown_task_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'image-caption' \(did you mean 'image-captioning'"):
        get_task("image-caption")
    own = Task("mine", (("a",),), TASKS["summarization"].convert, "")
    assert get_task(own) is own


def test_an_image_is_measured_where_a_task_asks_for_it(tmp_path: Path) -> None:
    seen: list[Any] = []

    def convert(row: Any, images: int, name: str, prompt: str) -> Any:
        seen.append(row["image_sizes"])
        return [plain_chat("a", "b")], []

    task = Task("sizes", (("image",), ("size",)), convert, "", measures=True)
    given = {"image": picture(size=(5, 3)), "size": "x"}
    as_rows([given], reader=task_reader(task))
    picture(size=(4, 2)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "size": "x"}\n')
    load_rows(str(tmp_path), task=task)
    assert seen[:2] == [[(5, 3)], [(4, 2)]]
