"""Rows as a user writes them in Python train the same batch as conversations do."""

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from builders import assistant, picture, plain_chat, png, row, user
from transformers import Trainer, TrainingArguments

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe.data.collator import VLMoECollator, VLMoEPreferenceCollator, VLMoEPromptCollator
from vlmoe.data.loading import load_rows
from vlmoe.data.rows import ConversationRows, as_rows

ASKED = {"question": "what color is it?", "answer": "blue"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with two pictures."""
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(picture(number)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def conversations() -> list[dict[str, Any]]:
    """What two rows of `ASKED` mean."""
    asked = user(ASKED["question"], 1), assistant(ASKED["answer"])
    return [row(*asked, images=[picture(number)]) for number in range(2)]


def sources(number: int, folder: Path) -> dict[str, Any]:
    """Every way to name the image of `number` in a list of rows."""
    return {
        "path": f"{number}.png",
        "absolute path": folder / f"{number}.png",
        "PIL": picture(number),
        "bytes": png(picture(number)),
        "undecoded": {"bytes": None, "path": f"{number}.png"},
    }


@pytest.mark.parametrize("kind", ["path", "absolute path", "PIL", "bytes", "undecoded"])
@pytest.mark.parametrize("column", ["image", "images"])
def test_a_list_of_questions_gives_the_batch_of_conversations(
    kind: str, column: str, folder: Path, processor: VLMoEProcessor
) -> None:
    images = [sources(number, folder)[kind] for number in range(2)]
    rows = [{column: [each] if column == "images" else each, **ASKED} for each in images]
    rows.append({column: None, "question": "is it red?", "answer": "no"})
    wanted = [
        row(user(ASKED["question"], 1), assistant("blue"), images=[picture(n)]) for n in (0, 1)
    ]
    wanted.append(row(user("is it red?"), assistant("no")))
    expected = VLMoECollator(processor)(wanted)
    for given in (rows, as_rows(rows), ConversationRows(rows)):
        batch = VLMoECollator(processor)(list(given))
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_messages_beside_an_image_column_take_their_image_from_it(
    folder: Path, processor: VLMoEProcessor
) -> None:
    expected = VLMoECollator(processor)(conversations())
    rows = [{"messages": each["messages"], "image": each["images"][0]} for each in conversations()]
    assert torch.equal(VLMoECollator(processor)(rows)["input_ids"], expected["input_ids"])
    for each in rows:
        each["messages"] = plain_chat(**ASKED)
    batch = VLMoECollator(processor)(rows)
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_a_dataset_of_questions_gives_the_batch_of_conversations(
    folder: Path, processor: VLMoEProcessor
) -> None:
    paths = datasets.Dataset.from_list([{"image": f"{n}.png", **ASKED} for n in range(2)])
    wanted = [
        row(user(ASKED["question"], 1), assistant("blue"), images=[picture(n)]) for n in (0, 1)
    ]
    expected = VLMoECollator(processor)(wanted)
    for given in (paths, paths.cast_column("image", datasets.Image())):
        batch = VLMoECollator(processor)(list(as_rows(given)))
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
        assert as_rows(given)["id"] == ["rows[0]", "rows[1]"]  # type: ignore[call-overload]


def test_rows_that_need_nothing_pass_through(data_folder: Path) -> None:
    rows = load_rows(str(data_folder))
    single = ConversationRows(rows)
    assert as_rows(rows) is rows and as_rows(single) is single
    subset = torch.utils.data.Subset(single, [0])
    assert as_rows(subset) is subset
    twice = as_rows(as_rows([{"image": picture(), **ASKED}]))
    assert twice[0]["id"] == "rows[0]"


def test_a_row_keeps_its_id_and_question_type() -> None:
    (seen,) = as_rows([{"id": "a", "question_type": "color", "image": picture(), **ASKED}])
    assert (seen["id"], seen["question_type"]) == ("a", "color")


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ("rows.jsonl", ValueError, r"'rows\.jsonl'; read it with load_rows"),
        ({"train": []}, ValueError, "a dict with the keys train"),
        (iter([]), ValueError, "has no length"),
        ([ASKED, "b"], ValueError, r"rows\[1\] is a str"),
        ([ASKED, {"image": "0.png"}], ValueError, r"rows\[1\]' has no `messages`; .*\['id', 'im"),
        (
            [ASKED, {"question": "a", "anwser": "b"}],
            ValueError,
            r"rows\[1\].*did you mean 'answer'",
        ),
        (
            [ASKED, {"image": "9.png", **ASKED}],
            FileNotFoundError,
            r"rows\[1\].*what.*no image .*9\.png",
        ),
        ([{"image": 3, "path": "", **ASKED}, 4], ValueError, r"rows\[1\] is a int"),
    ],
)
def test_rows_that_are_none_are_refused_by_name(
    rows: Any, error: type[Exception], message: str, folder: Path
) -> None:
    with pytest.raises(error, match=message):
        as_rows(rows)


def test_columns_that_nobody_reads_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        as_rows([{"picture": "a.png", **ASKED}, {"picture": "b.png", **ASKED}])
    (line,) = [each.getMessage() for each in caplog.records]
    assert "rows" in line and "picture" in line


@pytest.mark.parametrize("collator", [VLMoECollator, VLMoEPromptCollator, VLMoEPreferenceCollator])
@pytest.mark.parametrize("rest", [{}, {"label": 1}])
@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_columns_that_trainer_removed_name_its_option(
    collator: Any,
    rest: dict[str, int],
    kind: str,
    model_folder: Path,
    tmp_path: Path,
) -> None:
    model = VLMoEForConditionalGeneration.from_pretrained(model_folder)
    processor = VLMoEProcessor.from_pretrained(model_folder)
    rows: Any = [{**ASKED, **rest}] * 2
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        Trainer(
            model,
            args,
            train_dataset=rows if kind == "list" else datasets.Dataset.from_list(rows),
            data_collator=collator(processor),
        ).train()


def test_a_batch_without_rows_is_refused(processor: VLMoEProcessor) -> None:
    for collator in (VLMoECollator, VLMoEPromptCollator, VLMoEPreferenceCollator):
        with pytest.raises(ValueError, match="no rows"):
            collator(processor)([])  # type: ignore[operator]


def test_the_room_names_its_public_things() -> None:
    import vlmoe.data

    assert vlmoe.data.load_rows is load_rows and vlmoe.data.as_rows is as_rows
    assert all(getattr(vlmoe.data, name) is not None for name in vlmoe.data.__all__)
    assert {*vlmoe.data.__all__} <= {*dir(vlmoe.data)}
    with pytest.raises(AttributeError, match="no attribute 'load_row'"):
        vlmoe.data.load_row  # noqa: B018
