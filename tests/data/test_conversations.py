"""Reading and checking of dataset rows."""

from typing import Any

import pytest

from vlmoe.data.conversations import (
    IMAGE,
    Turn,
    parse_row,
    split_reference,
)
from vlmoe.data.row_formats import has_image_parts, without_image_parts

USER = {"role": "user", "content": [{"type": "text", "text": "how many?"}]}
ANSWER = {"role": "assistant", "content": "two"}


def image_question(text: str = "what is it?") -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


def test_strings_and_parts_give_the_same_conversation() -> None:
    plain = parse_row({"messages": [{"role": "user", "content": "how many?"}, ANSWER]}, 0)
    parts = parse_row({"messages": [USER, ANSWER]}, 0)
    assert plain.conversations == parts.conversations
    assert parts.conversations == [(Turn("user", ("how many?",)), Turn("assistant", ("two",)))]


def test_keys_that_arrow_fills_with_none_count_as_absent() -> None:
    content = [{"type": "image", "text": None}, {"type": "text", "text": "a", "image": None}]
    row = {"messages": [{"role": "user", "content": content}], "images": ["x.png"]}
    assert parse_row(row, 0).conversations == [(Turn("user", (IMAGE, "a")),)]


def test_list_of_conversations_stays_separate() -> None:
    row = {
        "messages": [[image_question("a"), ANSWER], [image_question("b"), ANSWER]],
        "images": ["x.png"],
        "question_type": ["color", "shape"],
    }
    parsed = parse_row(row, 0)
    assert [each[0].parts for each in parsed.conversations] == [(IMAGE, "a"), (IMAGE, "b")]
    assert parsed.question_types == ["color", "shape"]


def test_one_question_type_holds_for_every_conversation() -> None:
    row = {"messages": [[USER, ANSWER], [USER, ANSWER]], "question_type": "count"}
    assert parse_row(row, 0).question_types == ["count", "count"]


def test_missing_question_types_are_empty() -> None:
    row = {"messages": [[USER, ANSWER], [USER, ANSWER]], "question_type": ["count", None]}
    assert parse_row(row, 0).question_types == ["count", ""]
    assert parse_row({"messages": [USER, ANSWER]}, 0).question_types == [""]


def test_turn_goes_back_to_a_message() -> None:
    turn = parse_row({"messages": [image_question()], "images": [b""]}, 0).conversations[0][0]
    assert turn.as_message() == image_question()


BAD_ROWS = [
    ({"prompt": "a"}, r"has no `messages`; its columns are \['prompt'\]"),
    ({"messages": []}, "`messages` must be a list"),
    ({"messages": "hello"}, "`messages` must be a list"),
    ({"messages": [[], []]}, "a conversation must be a list of messages"),
    ({"messages": [USER, "hello"]}, "needs `role` and `content`"),
    ({"messages": [{"role": "user"}]}, "needs `role` and `content`"),
    ({"messages": [USER, {"role": "gpt", "content": "a"}]}, "unknown role 'gpt'; allowed are"),
    ({"messages": [{"role": "user", "content": None}]}, "must be a string or a list of parts"),
    (
        {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.mp3"}]}]},
        "unknown content part .*audio.*; allowed are",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]},
        r"a video part .* marks its place alone, got .*a\.mp4.*; put the video in .*`videos`",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
        "unknown content part",
    ),
    ({"messages": [ANSWER]}, r"has no user turn; its roles are \['assistant'\]"),
    (
        {
            "messages": [USER, image_question() | {"role": "assistant"}],
            "images": [b""],
        },
        "an assistant turn holds an image",
    ),
    ({"messages": [image_question()], "images": []}, "has 1 image parts, but the row has 0 images"),
    ({"messages": [image_question()]}, "has 1 image parts, but the row has 0 images"),
    ({"messages": [USER], "images": [b"", b""]}, "has 0 image parts, but the row has 2 images"),
    (
        {"messages": [[image_question()], [USER]], "images": [b""]},
        "has 0 image parts, but the row has 1 images",
    ),
    ({"messages": [image_question()], "images": "a.png"}, "`images` must be a list, got str"),
    (
        {"messages": [[USER, ANSWER], [USER, ANSWER]], "question_type": ["a"]},
        r"one string per conversation \(2\)",
    ),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_malformed_row_is_refused_by_name(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_row(row, 3)
    assert str(caught.value).startswith("row 3 of the batch")
    with pytest.raises(ValueError, match="row 'data/17'"):
        parse_row({**row, "id": "data/17"}, 3)


def test_error_quotes_the_first_question() -> None:
    row = {"messages": [image_question("is it round?"), ANSWER], "images": []}
    with pytest.raises(ValueError, match=r"row 0 of the batch \('is it round\?'\)"):
        parse_row(row, 0)


def test_row_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match="row 2 of the batch is a str"):
        parse_row("hello", 2)  # type: ignore[arg-type]


def test_reference_is_the_last_assistant_turn_only() -> None:
    conversation = parse_row({"messages": [USER, ANSWER, USER, ANSWER]}, 0).conversations[0]
    assert split_reference(conversation, "x") == (conversation[:3], "two")
    with pytest.raises(ValueError, match="x: the last message must be the assistant's"):
        split_reference(conversation[:3], "x")


def test_image_parts_are_taken_out_at_any_nesting() -> None:
    text_only = {"role": "user", "content": [{"type": "text", "text": "what is it?"}]}
    assert without_image_parts([image_question(), ANSWER]) == [text_only, ANSWER]
    assert without_image_parts([[image_question()], [USER]]) == [[text_only], [USER]]


def test_image_parts_are_found_at_any_nesting() -> None:
    assert has_image_parts([image_question(), ANSWER])
    assert has_image_parts([[USER, ANSWER], [image_question()]])
    assert not has_image_parts([USER, ANSWER])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mesages": [USER, ANSWER]}, "column 'mesages' is not read .did you mean 'messages'"),
        ({"imagse": ["a.png"]}, "column 'imagse' is not read .did you mean 'images'"),
        ({"imags": "a.png"}, "column 'imags' is not read .did you mean 'images'"),
        ({"question_typ": "count"}, "column 'question_typ' is not read .* 'question_type'"),
        ({"messages": [{"rol": "user", "content": "a"}, ANSWER]}, r"\(did you mean 'role'\?\)"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "key 'weight', which is not read"),
        (
            {"messages": [{**USER, "contents": "b"}, ANSWER]},
            "key 'contents', which is not read .did you mean 'content'",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a", "txt": "b"}]}
                ]
            },
            "part of type 'text' has the key 'txt', .*did you mean 'text'",
        ),
    ],
)
def test_fields_that_nobody_reads_are_named_with_the_nearest_known_one(
    change: dict[str, Any], named: str
) -> None:
    row = {"id": "r7"} | ({} if "mesages" in change else {"messages": [USER, ANSWER]}) | change
    with pytest.raises(ValueError, match=f"row 'r7'.*{named}"):
        parse_row(row, 0)


def test_other_columns_may_stand_beside_the_known_ones() -> None:
    row = {"messages": [USER, ANSWER], "source": "web", "ids": 3, "message": "kept by others"}
    assert parse_row(row, 0).conversations


@pytest.mark.parametrize(
    "messages", [None, [], "x", {}, {"a": 1}, [None], [{}], [[]], [[], 3], [{"content": None}], 7]
)
def test_broken_messages_hold_no_image_and_are_refused_by_name(messages: Any) -> None:
    assert not has_image_parts(messages)
    assert without_image_parts(messages) == messages
    with pytest.raises(ValueError, match="row 'r7'"):
        parse_row({"id": "r7", "messages": messages}, 0)


@pytest.mark.parametrize("key", ["weight", "loss", "train"])
def test_a_turn_may_say_that_what_is_learned_is_learned(key: str) -> None:
    said = [{**USER, key: 0.0}, {**ANSWER, key: True}]
    plain = parse_row({"messages": [USER, ANSWER]}, 0).conversations
    assert parse_row({"messages": said}, 0).conversations == plain
    for other in ([{**USER, key: 1}, ANSWER], [USER, {**ANSWER, key: 0.5}]):
        with pytest.raises(ValueError, match=f"the key '{key}', which is not read"):
            parse_row({"messages": other}, 0)
