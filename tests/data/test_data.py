"""Every kind of source gives the same rows, and bad ones a clear error."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from builders import plain_chat, png
from row_files import answers, as_dataset, conversation, picture, write_json, write_pictures

from vlmoe.data.augmentation import altered_image
from vlmoe.data.conversations import parse_row
from vlmoe.data.images import open_image
from vlmoe.data.loading import load_rows


def check(rows: datasets.Dataset, numbers: list[int]) -> None:
    """The rows are the conversations and pictures of these numbers, in the promised columns."""
    assert rows.column_names[:3] == ["id", "messages", "images"]
    assert rows.features["images"] == datasets.List(datasets.Image(decode=False))
    assert len(rows) == len(numbers)
    for position, (row, number) in enumerate(zip(rows, numbers, strict=True)):
        (turns,) = parse_row(row, position).conversations
        assert [turn.text() for turn in turns] == [f"question {number}?", f"answer {number}"]
        (image,) = row["images"]
        assert open_image(image, row["id"]).tobytes() == picture(number).tobytes()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_json_rows_name_images_relative_to_their_file(tmp_path: Path, name: str) -> None:
    write_pictures(tmp_path / "pictures", 3)
    rows = [{"messages": conversation(n), "images": [f"pictures/{n}.png"]} for n in range(3)]
    check(load_rows(str(write_json(tmp_path / name, rows))), [0, 1, 2])


def test_json_array_is_read(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    rows = [{"messages": conversation(n), "image": f"{n}.png"} for n in range(2)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    check(load_rows(str(tmp_path / "rows.json")), [0, 1])


def test_strings_and_parts_may_stand_in_one_file(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    plain = plain_chat("hello", "hi")
    several = [conversation(0), conversation(1)]
    rows = [
        {"messages": plain},
        {"messages": conversation(0), "images": ["0.png"]},
        {"messages": several, "images": ["0.png"]},
    ]
    loaded = load_rows(str(write_json(tmp_path / "rows.jsonl", rows)))
    parsed = [parse_row(row, i) for i, row in enumerate(loaded)]
    assert [len(row.images) for row in parsed] == [0, 1, 1]
    assert [len(row.conversations) for row in parsed] == [1, 1, 2]


def test_text_only_file_gets_empty_image_lists(tmp_path: Path) -> None:
    plain = plain_chat("hello", "hi")
    rows = load_rows(str(write_json(tmp_path / "rows.jsonl", [{"messages": plain}] * 2)))
    assert rows["images"][:] == [[], []]
    assert rows.features["images"] == datasets.List(datasets.Image(decode=False))


def test_parquet_file(tmp_path: Path) -> None:
    as_dataset().to_parquet(tmp_path / "rows.parquet")
    check(load_rows(str(tmp_path / "rows.parquet")), [0, 1, 2])


def test_single_image_column_becomes_a_list(tmp_path: Path) -> None:
    images = [{"bytes": png(picture(number)), "path": None} for number in range(2)]
    rows = {"messages": [conversation(number) for number in range(2)], "image": images}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.to_parquet(tmp_path / "rows.parquet")
    check(load_rows(str(tmp_path / "rows.parquet")), [0, 1])


def test_image_column_of_lists_is_renamed(tmp_path: Path) -> None:
    as_dataset().rename_column("images", "image").save_to_disk(tmp_path / "one")
    check(load_rows(str(tmp_path / "one")), [0, 1, 2])


def test_folder_has_the_splits_its_file_names_tell(tmp_path: Path) -> None:
    as_dataset(3).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    as_dataset(2).to_parquet(tmp_path / "my_test.parquet")
    as_dataset(1).to_parquet(tmp_path / "dev.parquet")
    as_dataset(4).to_parquet(tmp_path / "hard-00000-of-00001.parquet")
    sizes = {"train": 3, "test": 2, "validation": 1, "hard": 4}
    for split, size in sizes.items():
        check(load_rows(str(tmp_path), split), list(range(size)))
    with pytest.raises(ValueError, match="no split 'x'; it has: hard, test, train, validation"):
        load_rows(str(tmp_path), "x")


def test_split_names_are_whole_words(tmp_path: Path) -> None:
    as_dataset(1).to_parquet(tmp_path / "latest.parquet")
    as_dataset(2).to_parquet(tmp_path / "trainer_values.parquet")
    check(load_rows(str(tmp_path)), [0, 0, 1])


def test_several_files_of_a_split_are_joined_in_order(tmp_path: Path) -> None:
    for name in ("a", "b"):  # folders, each with its own pictures
        write_pictures(tmp_path / name, 2)
        rows = [{"messages": conversation(n), "images": [f"{n}.png"]} for n in range(2)]
        write_json(tmp_path / name / "rows.jsonl", rows)
    check(load_rows(str(tmp_path)), [0, 1, 0, 1])


def test_files_that_differ_in_type_are_refused(tmp_path: Path) -> None:
    plain = plain_chat("hello", "hi")
    write_json(tmp_path / "a" / "rows.jsonl", [{"messages": plain}])
    write_json(tmp_path / "b" / "rows.jsonl", [{"messages": conversation(0, images=0)}])
    with pytest.raises(ValueError, match=f"split 'train' of {tmp_path} differ in columns or types"):
        load_rows(str(tmp_path))


def test_image_folder_with_metadata(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    rows = [{"file_name": f"{n}.png", "messages": conversation(n)} for n in range(2)]
    write_json(tmp_path / "metadata.jsonl", rows)
    check(load_rows(str(tmp_path)), [0, 1])


def test_image_folder_with_metadata_per_split(tmp_path: Path) -> None:
    for split, numbers in (("train", [0, 1]), ("test", [1])):
        write_pictures(tmp_path / split / "img", 2)
        rows = [{"images": [f"img/{n}.png"], "messages": conversation(n)} for n in numbers]
        write_json(tmp_path / split / "metadata.jsonl", rows)
    check(load_rows(str(tmp_path)), [0, 1])
    check(load_rows(str(tmp_path), "test"), [1])


def test_saved_dataset(tmp_path: Path) -> None:
    shuffled = as_dataset().select([2, 0, 1])
    shuffled.save_to_disk(tmp_path / "one")
    check(load_rows(str(tmp_path / "one")), [2, 0, 1])
    with pytest.raises(ValueError, match="one has no split 'test'; it has: train"):
        load_rows(str(tmp_path / "one"), "test")


def test_saved_dataset_of_several_splits(tmp_path: Path) -> None:
    splits = {"train": as_dataset(2), "test": as_dataset(1)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    check(load_rows(str(tmp_path / "two")), [0, 1])
    check(load_rows(str(tmp_path / "two"), "test"), [0])


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load_dataset(path: str, name: str | None, split: str) -> datasets.Dataset:
        calls.append((path, name, split))
        return as_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check(load_rows("someone/something", "train[:3]", config_name="big"), [0, 1, 2])
    assert calls == [("someone/something", "big", "train[:3]")]


def test_order_of_a_shuffled_dataset_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled = as_dataset().select([2, 0, 1])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: shuffled)
    check(load_rows("someone/something"), [2, 0, 1])


def test_hub_errors_name_the_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> Any:
        def load_dataset(*args: Any, **kwargs: Any) -> None:
            raise error

        return load_dataset

    monkeypatch.setattr(datasets, "load_dataset", fail(ConnectionError("no network")))
    with pytest.raises(FileNotFoundError, match=r"'a/b' is no local file.*no network"):
        load_rows("a/b")
    monkeypatch.setattr(datasets, "load_dataset", fail(ValueError('Unknown split "x".')))
    with pytest.raises(ValueError, match="the dataset 'a/b', split 'x': Unknown split"):
        load_rows("a/b", "x")


def test_images_are_not_rewritten_to_be_left_encoded(tmp_path: Path) -> None:
    as_dataset().save_to_disk(tmp_path / "one")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    rows = load_rows(str(tmp_path / "one"))
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    assert rows.cache_files  # still mapped from the saved file


def test_ids_are_kept_or_made(tmp_path: Path) -> None:
    rows = [{"messages": conversation(n, images=0), "id": n + 10} for n in range(2)]
    assert load_rows(str(write_json(tmp_path / "a.jsonl", rows)))["id"][:] == ["10", "11"]
    for row in rows:
        del row["id"]
    made = load_rows(str(write_json(tmp_path / "b_test.jsonl", rows)), "test")
    assert made["id"][:] == ["test[0]", "test[1]"]


def test_question_types_are_kept_and_other_columns_dropped(tmp_path: Path) -> None:
    rows = [{"messages": conversation(0, images=0), "question_type": "count", "extra": 1}]
    loaded = load_rows(str(write_json(tmp_path / "a.jsonl", rows)))
    assert loaded.column_names == ["id", "messages", "images", "question_type"]
    assert loaded["question_type"][:] == ["count"]


def test_limit_keeps_the_first_rows(tmp_path: Path) -> None:
    as_dataset().save_to_disk(tmp_path / "one")
    check(load_rows(str(tmp_path / "one"), limit=2), [0, 1])
    check(load_rows(str(tmp_path / "one"), limit=9), [0, 1, 2])
    with pytest.raises(ValueError, match="limit must be at least 1 or None, got 0"):
        load_rows(str(tmp_path / "one"), limit=0)


def test_altered_copies_follow_the_rows(tmp_path: Path) -> None:
    as_dataset().save_to_disk(tmp_path / "one")
    rows = load_rows(str(tmp_path / "one"), limit=2, altered_copies=2)
    check(rows.select([0, 1]), [0, 1])
    for copy_number in (1, 2):
        for number in range(2):
            plain, copy = rows[number], rows[2 * copy_number + number]
            assert copy["messages"] == plain["messages"]
            assert copy["id"] == f"{plain['id']} altered {copy_number}"
            expected = altered_image(plain["images"][0], f"row {plain['id']!r}", copy_number)
            assert copy["images"][0]["bytes"] == expected["bytes"]
    again = load_rows(str(tmp_path / "one"), limit=2, altered_copies=2)
    assert rows.to_dict() == again.to_dict()
    with pytest.raises(ValueError, match="altered_copies must be at least 0, got -1"):
        load_rows(str(tmp_path / "one"), altered_copies=-1)


def test_rows_without_images_keep_their_text(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    rows = [
        {"messages": conversation(0), "images": ["0.png"]},
        {"messages": [conversation(1), conversation(2)], "images": ["0.png"]},
    ]
    loaded = load_rows(
        str(write_json(tmp_path / "a.jsonl", rows)), with_images=False, altered_copies=1
    )
    texts = [
        [conversation[0].parts for conversation in parse_row(row, 0).conversations]
        for row in loaded
    ]
    expected = [[("question 0?",)], [("question 1?",), ("question 2?",)]]
    assert texts == expected * 2
    assert loaded["images"][:] == [[]] * 4


def test_easy_vqa_by_its_word() -> None:
    pytest.importorskip("easy_vqa")
    rows = load_rows("easy_vqa", "test", limit=3)
    assert rows.column_names == ["id", "messages", "images", "question_type"]
    assert len(rows[0]["messages"]) == len(rows[0]["question_type"]) > 1
    captions = load_rows("easy_vqa_captions", "test", limit=3)
    assert captions.features == rows.features
    with pytest.raises(ValueError, match="easy_vqa has no split 'dev'"):
        load_rows("easy_vqa", "dev")


@pytest.mark.parametrize("source", ["/nowhere/rows", "./rows", "rows.jsonl", "a/rows.parquet"])
def test_missing_path_is_refused_without_asking_the_hub(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(FileNotFoundError, match=f"there is no file or folder {source}"):
        load_rows(source)


@pytest.mark.parametrize("content", ["", "[]", "\n"])
def test_empty_dataset_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(ValueError, match=r"empty dataset: .*rows\.json"):
        load_rows(str(tmp_path / "rows.json"))


def test_empty_parquet_is_refused(tmp_path: Path) -> None:
    as_dataset().select([]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="empty dataset"):
        load_rows(str(tmp_path / "rows.parquet"))


def test_missing_messages_are_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b"}])
    message = "lacks the column `messages`; it has: prompt, answer. Needed are `messages`"
    with pytest.raises(ValueError, match=f"a.jsonl {message}"):
        load_rows(str(path))


@pytest.mark.parametrize(
    ("column", "meant"),
    [
        ("mesages", "messages"),
        ("imagse", "images"),
        ("Question_type", "que"),
        ("conversation", "conversations"),
        ("answers", "answer"),
    ],
)
def test_a_misspelled_column_is_named_with_the_one_that_was_meant(
    tmp_path: Path, column: str, meant: str
) -> None:
    row: dict[str, Any] = {"messages": conversation(0, images=0), column: "x"}
    if meant not in ("images", "que"):
        row = {"question": "a", column: row["messages"]}
    path = write_json(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=f"column '{column}' is not read .did you mean '{meant}"):
        load_rows(str(path))


def test_columns_that_nobody_reads_are_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"messages": conversation(0, images=0), "source": "web", "score": 1}] * 2
    load_rows(str(write_json(tmp_path / "a.jsonl", rows)))
    (line,) = [each for each in caplog.messages if "not read" in each]
    assert line.endswith("a.jsonl: these columns are not read: source, score.")


def test_image_parts_without_an_image_column_are_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.jsonl", [{"messages": conversation(0), "photo": "a.png"}])
    with pytest.raises(ValueError, match=r"no image column .*; it has: messages, photo"):
        load_rows(str(path))


def test_missing_image_file_is_refused_by_row(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    rows = [{"messages": conversation(n), "images": [f"{n}.png"]} for n in range(2)]
    path = write_json(tmp_path / "a.jsonl", rows)
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl, row 1, image 0: .* file .*1\.png"):
        load_rows(str(path))


def test_broken_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [')
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be read as json: JSON parse error"):
        load_rows(str(tmp_path / "a.jsonl"))


def test_file_of_another_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a,b")
    with pytest.raises(
        ValueError, match=r"unknown file type; allowed are \.parquet, \.json, \.json"
    ):
        load_rows(str(tmp_path / "a.txt"))


def test_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a folder without any"):
        load_rows(str(tmp_path))


def test_unknown_split_of_a_file_is_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.jsonl", [{"messages": conversation(0, images=0)}])
    with pytest.raises(ValueError, match=r"a\.jsonl has no split 'test'; it has: train"):
        load_rows(str(path), "test")


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("name", ["rows", "metadata"])
def test_tables_are_read_as_text(
    tmp_path: Path, suffix: str, separator: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path, 3)
    lines = [
        ("\ufefffile_name", "question", "answer"),
        ("0.png", '"a, ""b""\tc?"', "007"),
        ("1.png", "question?", "NA"),
        (".\\2.png", "question?", "null"),
    ]
    path = tmp_path / f"{name}.{suffix}"
    path.write_text("\n".join(separator.join(line) for line in lines), encoding="utf-8")
    for source in (path, tmp_path):
        rows = load_rows(str(source))
        assert answers(rows) == ["007", "NA", "null"]
        assert parse_row(rows[0], 0).conversations[0][0].text() == 'a, "b"\tc?'
        for number, row in enumerate(rows):
            assert open_image(row["images"][0], "x").tobytes() == picture(number).tobytes()


def test_a_table_beside_rows_is_not_read(tmp_path: Path) -> None:
    write_json(tmp_path / "rows.jsonl", [{"messages": conversation(1, images=0)}])
    (tmp_path / "scores.csv").write_text("a,b\n1,2\n")
    assert answers(load_rows(str(tmp_path))) == ["answer 1"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv"])
def test_another_encoding_is_refused_with_the_remedy(
    tmp_path: Path, name: str, encoding: str
) -> None:
    text = json.dumps({"messages": conversation(1, images=0)}) if "json" in name else "a,b\n1,2\n"
    (tmp_path / name).write_text(text, encoding=encoding)
    with pytest.raises(ValueError, match=rf"{name}: is in UTF-16 .* Save it as UTF-8"):
        load_rows(str(tmp_path / name))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"a": "\n' + "[" * 100_000,
        "]" * 200_000 + "\n" + "[" * 100_000,
        '{"a": "\\\\"}\n{"b": ' + "[" * 100_000,
    ],
    ids=["lists", "objects", "closed", "after an open string", "after a surplus", "after escapes"],
)
def test_deep_json_is_refused_before_it_is_parsed(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: nested too deep.* depth of 100"):
        load_rows(str(tmp_path / name))


@pytest.mark.parametrize("content", [b"PAR1" * 100, b"PAR1" + bytes(range(256)) * 4 + b"PAR1"])
def test_damaged_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.parquet cannot be read as parquet"):
        load_rows(str(tmp_path / "rows.parquet"))
