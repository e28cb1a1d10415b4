"""Rows in the forms of other projects become the conversations that they mean."""

import base64
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from vlmoe.data.conversations import IMAGE, parse_row
from vlmoe.data.images import open_image
from vlmoe.data.loading import load_rows
from vlmoe.data.rows import ConversationRows

RED, BLUE = "red.png", "blue.png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a red and a blue picture."""
    for name in (RED, BLUE):
        Image.new("RGB", (3, 2), name.removesuffix(".png")).save(tmp_path / name)
    return tmp_path


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def read(source: str) -> list[tuple[list[list[tuple[str, tuple[Any, ...]]]], list[str]]]:
    """Each row's conversations as (role, parts) pairs, and the colors of its pictures."""
    result = []
    for position, row in enumerate(load_rows(source)):
        parsed = parse_row(row, position)
        pictures = [open_image(image, parsed.name).getpixel((0, 0)) for image in parsed.images]
        colors = [{(255, 0, 0): "red", (0, 0, 255): "blue"}[pixel] for pixel in pictures]
        result.append(([[tuple(turn) for turn in each] for each in parsed.conversations], colors))
    return result


def png_base64(folder: Path, name: str) -> str:
    return base64.b64encode((folder / name).read_bytes()).decode()


def user(*parts: Any) -> tuple[str, tuple[Any, ...]]:
    return ("user", parts)


def answer(text: str) -> tuple[str, tuple[Any, ...]]:
    return ("assistant", (text,))


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": speaker, "value": value} for speaker, value in pairs]


def chat(content: Any, reply: Any = "red") -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]


TEXT = {"type": "text", "text": "color?"}
ASKED = [[user(IMAGE, "color?"), answer("red")]]
FORMS: dict[str, tuple[list[dict[str, Any]], list[Any]]] = {
    "llava": (
        [
            {
                "id": "1",
                "image": RED,
                "conversations": turns(("human", "<image>\ncolor?"), ("gpt", "red")),
            },
            {
                "id": "2",
                "image": [RED, BLUE],
                "conversations": turns(
                    ("system", "be short"),
                    ("human", "is <image> like\n<image>"),
                    ("gpt", "<image> no"),
                    ("human", "sure?"),
                    ("gpt", "yes"),
                ),
            },
            {"id": "3", "conversations": turns(("human", "1+2?"), ("gpt", "3"))},
        ],
        [
            (ASKED, ["red"]),
            (
                [
                    [
                        ("system", ("be short",)),
                        user("is ", IMAGE, " like", IMAGE),
                        answer("<image> no"),
                        user("sure?"),
                        answer("yes"),
                    ]
                ],
                ["red", "blue"],
            ),
            ([[user("1+2?"), answer("3")]], []),
        ],
    ),
    "sharegpt without markers": (
        [
            {
                "images": [RED],
                "conversations": [
                    {"from": "user", "value": "color?", "weight": 0.0},
                    {"from": "assistant", "value": "red", "weight": 1.0},
                ],
            }
        ],
        [(ASKED, ["red"])],
    ),
    "conversations with roles": (
        [{"conversations": chat("color?")}],
        [([[user("color?"), answer("red")]], [])],
    ),
    "question and answer": (
        [
            {"image": RED, "question": "color?", "answer": "red"},
            {"image": None, "question": "1+2?", "answer": 3},
            {"image": None, "question": "price?", "answer": "3.50"},
        ],
        [
            (ASKED, ["red"]),
            ([[user("1+2?"), answer("3")]], []),
            ([[user("price?"), answer("3.50")]], []),
        ],
    ),
    "trl texts": (
        [{"images": [RED], "prompt": "color?", "completion": "red"}],
        [(ASKED, ["red"])],
    ),
    "trl messages": (
        [
            {
                "images": [RED],
                "prompt": [{"role": "user", "content": [{"type": "image"}, TEXT]}],
                "completion": [{"role": "assistant", "content": "red"}],
            }
        ],
        [(ASKED, ["red"])],
    ),
    "inside the content": (
        [
            {"messages": chat([{"type": "image", "image": RED}, TEXT])},
            {"messages": chat([{"type": "image", "path": BLUE}, TEXT], "3")},
            {"messages": chat([{"type": "image", "url": RED}, TEXT])},
            {"messages": chat("color?")},
        ],
        [
            (ASKED, ["red"]),
            ([[user(IMAGE, "color?"), answer("3")]], ["blue"]),
            (ASKED, ["red"]),
            ([[user("color?"), answer("red")]], []),
        ],
    ),
    "markers in plain texts": (
        [
            {"messages": chat("<image>color?"), "images": [RED]},
            {"messages": chat("color?"), "images": [RED]},
            {"messages": chat("what is 1+2?", "3"), "images": []},
        ],
        [(ASKED, ["red"]), (ASKED, ["red"]), ([[user("what is 1+2?"), answer("3")]], [])],
    ),
    "markers in plain texts beside parts": (
        [
            {"messages": chat("<image>color?"), "images": [RED]},
            {"messages": chat([{"type": "image"}, TEXT], "not <image>"), "images": [RED]},
        ],
        [(ASKED, ["red"]), ([[user(IMAGE, "color?"), answer("not <image>")]], ["red"])],
    ),
    "captions": (
        [{"file_name": RED, "text": "a red square"}],
        [([[user(IMAGE), answer("a red square")]], ["red"])],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_conversations_it_means(form: str, folder: Path) -> None:
    rows, expected = FORMS[form]
    assert read(write(folder, rows)) == expected


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_passed_as_objects_are_read_alike(
    form: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, expected = FORMS[form]
    monkeypatch.chdir(folder)
    for position, (row, (conversations, colors)) in enumerate(zip(rows, expected, strict=True)):
        parsed = parse_row(row, position)
        assert [[tuple(turn) for turn in each] for each in parsed.conversations] == conversations
        assert parsed.images == [f"{color}.png" for color in colors]
        (seen,) = ConversationRows([row])
        assert parse_row(seen, position).conversations == parsed.conversations


@pytest.mark.parametrize("form", FORMS)
def test_one_line_says_what_was_recognised(
    form: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_rows(write(folder, FORMS[form][0]))
    (line,) = [record.getMessage() for record in caplog.records if "read as" in record.message]
    assert "rows.jsonl: read as " in line


def test_openai_data_urls_are_pictures(folder: Path) -> None:
    url = f"data:image/png;base64,{png_base64(folder, BLUE)}"
    part = {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    assert read(write(folder, [{"messages": chat([TEXT, part])}])) == [
        ([[user("color?", IMAGE), answer("red")]], ["blue"])
    ]


def test_base64_inside_the_content_is_a_picture(folder: Path) -> None:
    part = {"type": "image", "base64": png_base64(folder, BLUE)}
    rows = [{"messages": chat([part, TEXT])}]
    assert read(write(folder, rows)) == [([[user(IMAGE, "color?"), answer("red")]], ["blue"])]


def test_image_columns_of_parquet_files_count_without_being_decoded(folder: Path) -> None:
    content = (folder / BLUE).read_bytes()
    rows = {
        "image": [{"bytes": content, "path": None}, None, {"bytes": b"broken", "path": None}],
        "question": ["color?", "1+2?", "color?"],
        "answer": ["red", "3", "red"],
    }
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.select([1, 0, 2]).to_parquet(folder / "rows.parquet")
    loaded = load_rows(str(folder / "rows.parquet"))
    assert [len(images) for images in loaded["images"]] == [0, 1, 1]
    counts = [parse_row(row, 0).conversations[0][0].parts.count(IMAGE) for row in loaded]
    assert counts == [0, 1, 1]


def test_a_folder_of_pictures_with_captions(folder: Path) -> None:
    (folder / "train").mkdir()
    for name, text in ((RED, "a red square\n"), (BLUE, "ein blaues Rechteck, größer")):
        (folder / name).rename(folder / "train" / name)
        (folder / "train" / name).with_suffix(".txt").write_text(text)
    assert read(str(folder)) == [
        ([[user(IMAGE), answer("ein blaues Rechteck, größer")]], ["blue"]),
        ([[user(IMAGE), answer("a red square")]], ["red"]),
    ]


def test_a_picture_without_its_caption_is_named(folder: Path) -> None:
    (folder / "red.txt").write_text("a red square")
    with pytest.raises(ValueError, match=r"blue\.png has no caption blue\.txt beside it"):
        load_rows(str(folder))
    (folder / "blue.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"blue\.txt is not UTF-8"):
        load_rows(str(folder))


@pytest.mark.parametrize(
    "text", ['{"total": 12.50}', "[]", "[1, 2]", "3.50", "true", "null", "007"]
)
def test_a_text_that_is_json_stays_that_text(text: str, folder: Path) -> None:
    """`datasets` reads it as JSON where a column holds texts and lists, or texts and numbers."""
    plain = [{"type": "text", "text": "b"}]
    rows: list[dict[str, Any]] = [{"messages": chat([TEXT], text)}, {"messages": chat("a", plain)}]
    expected = [[user("color?"), answer(text)]], []
    assert read(write(folder, rows))[0] == expected
    rows = [{"question": "color?", "answer": text}, {"question": "a", "answer": 3}]
    assert read(write(folder, rows))[0] == expected


BAD = {
    "an unknown speaker": (
        [{"conversations": turns(("human", "a"), ("narrator", "b"))}],
        "unknown role 'narrator'",
    ),
    "a marker without its image": (
        [{"conversations": turns(("human", "<image>a"), ("gpt", "b"))}],
        "have image parts, but there is no image column",
    ),
    "fewer markers than images": (
        [{"image": [RED, BLUE], "conversations": turns(("human", "<image>a"), ("gpt", "b"))}],
        "has 1 image parts, but the row has 2 images",
    ),
    "no turns": ([{"conversations": []}], "`messages`|a conversation must be a list"),
    "no answer": (
        [{"question": "a", "answer": "b"}, {"question": "c", "answer": None}],
        "row 'train.1.' .*content of the assistant turn must be a string",
    ),
    "a turn with a key that nobody reads": (
        [{"conversations": [*turns(("human", "a")), {"from": "gpt", "value": "b", "loss": 0}]}],
        "row 0: a turn has the key 'loss'",
    ),
    "a part with a key that nobody reads": (
        [{"messages": chat([{"type": "image", "imgae": RED, "path": RED}])}],
        "row 0: an image part has the key 'imgae', which is not read .did you mean 'image'",
    ),
    "pictures in two places": (
        [{"messages": chat([{"type": "image", "image": RED}]), "images": [BLUE]}],
        "inside the content of messages and in the column 'images'",
    ),
    "a missing picture": (
        [{"image": "gone.png", "question": "a", "answer": "b"}],
        "row 0, image 0: .*gone.png",
    ),
    "a broken base64": (
        [{"messages": chat([{"type": "image", "base64": "%%%"}])}],
        "row 0, image 0",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_faulty_rows_of_other_forms_are_refused_by_name(fault: str, folder: Path) -> None:
    rows, message = BAD[fault]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(write(folder, rows))


@pytest.mark.parametrize(("name", "separator"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_tables_of_questions_and_answers(name: str, separator: str, folder: Path) -> None:
    table = [("image", "question", "answer"), (RED, "color?", "red"), ("", "1+2?", "3.50")]
    (folder / name).write_text("\n".join(separator.join(line) for line in table) + "\n")
    assert read(str(folder / name)) == [
        (ASKED, ["red"]),
        ([[user("1+2?"), answer("3.50")]], []),
    ]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_an_image_folder_with_captions_in_its_metadata(name: str, folder: Path) -> None:
    rows = [{"file_name": RED, "text": "a red square"}, {"file_name": BLUE, "text": "blue"}]
    if name.endswith("csv"):
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        (folder / name).write_text("\n".join(lines))
    else:
        write(folder, rows, name)
    assert read(str(folder)) == [
        ([[user(IMAGE), answer("a red square")]], ["red"]),
        ([[user(IMAGE), answer("blue")]], ["blue"]),
    ]
