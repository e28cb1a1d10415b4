# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Rows in the forms that other projects write, as conversations.

| form | what tells it | becomes |
|---|---|---|
| conversations | `messages`, pictures in `images` | itself, untouched |
| pictures inside the content | a part `{"type": "image", "image" or "path" or "url": ...}` or \
`{"type": "image_url", "image_url": {"url": ...}}` (OpenAI) | the same parts, pictures in `images` |
| LLaVA, ShareGPT | `conversations` of `{"from": ..., "value": ...}` | a turn each; `<image>` in \
what is not the model's becomes an image part, and the line break beside it goes |
| prompt and completion (TRL) | `prompt`, `completion`: texts, or lists of messages | one \
conversation |
| questions | `question`, `answer` | the images, the question, the answer |
| captions | `text` or `caption` beside an image | the images, the caption |

Where a text names no image of its row, the images stand before the first user text. A converter is
a function of one row; what it does not understand it passes on, for `parse_row` to refuse by name.
"""

import base64
import binascii
import dataclasses
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .conversations import MESSAGE_KEYS, has_image_parts, require_known_keys

if TYPE_CHECKING:
    from datasets import Dataset, Features

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("images", "image", "file_name")
READ_AS_WELL = (
    "`conversations` (LLaVA, ShareGPT), `question` and `answer`, `prompt` and `completion`, or "
    "`text` beside an image"
)
CAPTION_COLUMNS = ("text", "caption")
PICTURE_KEYS = ("image", "path", "url", "image_url", "base64")
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
MARKER = re.compile(r"<image>\n|\n<image>|<image>")

TO_BE_READ = r'^\s*[^\[{"\s]|"(image|path|url|image_url|base64)"\s*:\s*[^n\s]'
"""Found in JSON of messages that holds a bare number or a picture."""

FAULTY: list[Any] = [[{"role": "faulty", "content": []}]]
"""The messages of a row whose fault is kept in place of being raised."""

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class RowFormat:
    """A form of rows: what it is called, the columns it is read from, and its converter.

    `convert(row, images, name)` gives the messages of a row with so many images in its columns, and
    the pictures that stood inside its content.
    """

    name: str
    columns: tuple[str, ...]
    convert: Callable[[Mapping[str, Any], int, str], tuple[list[Messages], list[Any]]]


def row_format(rows: "Dataset") -> RowFormat | None:
    """The form of rows, or None for conversations with `images` and for other rows."""
    columns = rows.features
    if "messages" in columns:
        inside = _hold_pictures(columns["messages"], _stored(rows, "messages"))
        return RowFormat("pictures inside the content", ("messages",), _chat) if inside else None
    if "conversations" in columns:
        return RowFormat("LLaVA or ShareGPT conversations", ("conversations",), _turns)
    if {"prompt", "completion"} <= columns.keys():
        return RowFormat("prompt and completion", ("prompt", "completion"), _completion)
    if {"question", "answer"} <= columns.keys():
        return RowFormat("question and answer", ("question", "answer"), _question)
    caption = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if caption and any(name in columns for name in IMAGE_COLUMNS):
        return RowFormat("captions", (caption,), _caption)
    return None


def as_conversations(rows: "Dataset", source: str, faults: list[str] | None = None) -> "Dataset":
    """The rows with `messages` in place of the columns of another form; pictures that stood inside
    the content are in `images`, as `{"bytes", "path"}`. Conversations are returned as they are.

    Raises `ValueError` naming the row for a key that nobody reads, unless there is a list of
    `faults` to add it to, and for pictures both inside the content and in a column.
    """
    rows = _encoded(rows, json=False)
    form = row_format(rows)
    if form is None:
        return rows
    from datasets import concatenate_datasets

    texts = _encoded(rows.select_columns(list(form.columns)))
    converted = texts.add_column("image_count", _image_counts(rows)).map(
        _converted,
        with_indices=True,
        fn_kwargs={"form": form, "features": texts.features, "source": source},
        remove_columns=[*form.columns, "image_count"],
        features=_features(),
        desc=f"reading {form.name}",
    )
    found = [fault for fault in converted["fault"] if fault is not None]
    if faults is not None:
        faults += found
    elif found:
        raise ValueError(found[0])
    converted = converted.remove_columns("fault")
    column = _image_column(rows)
    if any(converted["pictures"]):
        if column is not None:
            raise ValueError(
                f"{source} has pictures inside the content of messages and in the column "
                f"{column!r}; keep one of them."
            )
        converted = converted.rename_column("pictures", "images")
    else:
        converted = converted.remove_columns("pictures")
    if form.convert is not _chat or "images" in converted.column_names:
        logger.warning("%s: read as %s (%s).", source, form.name, ", ".join(form.columns))
    others = rows.remove_columns(list(form.columns))
    return concatenate_datasets([others, converted], axis=1) if others.column_names else converted


def _converted(
    row: dict[str, Any], position: int, form: RowFormat, features: Any, source: str
) -> dict[str, Any]:
    """One row of `as_conversations`."""
    decoded = {name: _decoded(row[name], features[name]) for name in features}
    name = f"{source}, row {position}"
    try:
        messages, pictures = form.convert(decoded, row["image_count"], name)
    except ValueError as error:
        return {"messages": FAULTY, "pictures": [], "fault": str(error)}
    return {
        "messages": messages,
        "pictures": [_entry(picture) for picture in pictures],
        "fault": None,
    }


def is_faulty(given: Any) -> bool:
    """Whether a row, or an entry of `images`, stands for one whose fault was kept when reading."""
    if not isinstance(given, Mapping):
        return False
    if "messages" in given:
        return given["messages"] == FAULTY
    return given.get("bytes") is None and given.get("path") is None


def _chat(row: Mapping[str, Any], count: int, name: str) -> tuple[list[Messages], list[Any]]:
    """Messages whose parts may hold pictures; all conversations of a row share them."""
    given = row["messages"]
    several = isinstance(given, list) and bool(given) and isinstance(given[0], list)
    pictures: list[Any] = []
    conversations = []
    for conversation in given if several else [given]:
        messages, own = _messages(conversation, name)
        conversations.append(messages)
        pictures = pictures or own
        if own and own != pictures:
            raise ValueError(f"{name}: its conversations are about different pictures.")
    return conversations, pictures


def _turns(row: Mapping[str, Any], count: int, name: str) -> tuple[list[Messages], list[Any]]:
    """LLaVA's and ShareGPT's turns."""
    given = row["conversations"]
    if not isinstance(given, list) or not all(isinstance(turn, dict) for turn in given):
        return [], []
    if any(turn.get("role") is not None for turn in given):
        messages, pictures = _messages(given, name)
        return [messages], pictures
    messages = []
    for turn in given:
        require_known_keys(turn, ("from", "value"), f"{name}: a turn")
        role = _string(turn.get("from"))
        role = SPEAKERS.get(role or "", role)
        content = _text_parts(turn.get("value"), marked=role != "assistant")
        messages.append({"role": role, "content": content})
    return [_with_images(messages, count)], []


def _completion(row: Mapping[str, Any], count: int, name: str) -> tuple[list[Messages], list[Any]]:
    """TRL's prompt and completion."""
    messages: Messages = []
    pictures: list[Any] = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row[column], list):
            more, own = _messages(row[column], name)
            messages, pictures = messages + more, pictures + own
        else:
            marked = bool(count) and role == "user"
            messages.append({"role": role, "content": _text_parts(row[column], marked=marked)})
    return [messages if pictures else _with_images(messages, count)], pictures


def _question(row: Mapping[str, Any], count: int, name: str) -> tuple[list[Messages], list[Any]]:
    """A question about the row's images and its answer."""
    asked = _text_parts(row["question"], marked=count > 0)
    return [_dialogue(asked, _text_parts(row["answer"]), count)], []


def _caption(row: Mapping[str, Any], count: int, name: str) -> tuple[list[Messages], list[Any]]:
    """The row's images and their caption."""
    (caption,) = row.values()
    return [_dialogue([], _text_parts(caption), count)], []


def _dialogue(asked: Any, answer: Any, count: int) -> Messages:
    """A user turn with so many images, and the answer."""
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return _with_images(messages, count)


def _with_images(messages: Messages, count: int) -> Messages:
    """Messages that name no image, with `count` image parts before the first user text."""
    if count and not has_image_parts(messages):
        user = next((message for message in messages if message["role"] == "user"), None)
        if user is not None and user["content"] is not None:
            user["content"] = [{"type": "image", "text": None}] * count + user["content"]
    return messages


def _messages(given: Any, name: str) -> tuple[Messages, list[Any]]:
    """Messages with their content as parts, and the pictures of those parts in order."""
    messages, pictures = [], []
    for message in given if isinstance(given, list) else []:
        if not isinstance(message, dict):
            messages.append({"role": None, "content": None})
            continue
        require_known_keys(message, MESSAGE_KEYS, f"{name}: a message")
        content = message.get("content")
        if isinstance(content, list):
            content, own = _parts(content, name)
            pictures += own
        else:
            content = _text_parts(content)
        messages.append({"role": _string(message.get("role")), "content": content})
    return messages, pictures


def _parts(content: list[Any], name: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Parts without pictures in them, and those pictures."""
    parts, pictures = [], []
    for part in content:
        given = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
        if given.get("type") in ("image", "image_url"):
            known = ("type", *PICTURE_KEYS, "detail")
            require_known_keys(given, known, f"{name}: an image part")
            pictures += [_picture(key, given[key]) for key in PICTURE_KEYS if key in given]
            parts.append({"type": "image", "text": None})
        else:
            require_known_keys(given, ("type", "text"), f"{name}: a text part")
            parts.append({"type": _string(given.get("type")), "text": _string(given.get("text"))})
    return parts, pictures


def _picture(key: str, value: Any) -> Any:
    """What a picture key names: a path or URL, `{"bytes", "path"}`, or bytes."""
    if key == "image_url" and isinstance(value, dict):
        return value.get("url")
    if key == "base64" and isinstance(value, str):
        try:
            return {"bytes": base64.b64decode(value, validate=True), "path": None}
        except binascii.Error:
            return value
    return value


def _entry(picture: Any) -> dict[str, Any]:
    """A picture as a `datasets.Image` stores it."""
    if isinstance(picture, dict):
        return {"bytes": picture.get("bytes"), "path": picture.get("path")}
    return {"bytes": None, "path": picture if isinstance(picture, str) else json.dumps(picture)}


def _marked_parts(text: str) -> list[dict[str, Any]]:
    """A text cut at its `<image>` markers."""
    parts: list[dict[str, Any]] = []
    for number, piece in enumerate(MARKER.split(text)):
        parts += [{"type": "image", "text": None}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _text_parts(value: Any, marked: bool = False) -> list[dict[str, Any]] | None:
    """A text, cut at image markers if `marked`; None, which `parse_row` refuses, without one."""
    text = _string(value)
    if text is None:
        return None
    return _marked_parts(text) if marked else [{"type": "text", "text": text}]


def _string(value: Any) -> str | None:
    """A string, or a number as one; None for anything else."""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return value if isinstance(value, str) else None


def _hold_pictures(feature: Any, stored: Any) -> bool:
    """Whether messages of this feature, as Arrow stores them, hold pictures (or bare numbers, which
    are texts that `datasets` would turn into numbers)."""
    import pyarrow.compute
    from datasets import Json

    if isinstance(feature, Json):
        texts = stored.cast(pyarrow.string())
        return pyarrow.compute.any(pyarrow.compute.match_substring_regex(texts, TO_BE_READ)).as_py()
    if isinstance(feature, Mapping):
        fields = {name: pyarrow.compute.struct_field(stored, name) for name in feature}
        return any(
            fields[name].null_count < len(stored)
            if "type" in feature and name in PICTURE_KEYS
            else _hold_pictures(inner, fields[name])
            for name, inner in feature.items()
        )
    if hasattr(feature, "feature"):
        return _hold_pictures(feature.feature, pyarrow.compute.list_flatten(stored))
    return False


def _stored(rows: "Dataset", column: str) -> Any:
    """A column as Arrow stores it."""
    return rows.with_format("arrow").select_columns([column])[:][column]


def _image_column(rows: "Dataset") -> str | None:
    return next((name for name in IMAGE_COLUMNS if name in rows.column_names), None)


def _image_counts(rows: "Dataset") -> list[int]:
    """How many images the image column of each row holds, none of them decoded."""
    import pyarrow
    import pyarrow.compute
    from datasets import Json

    column = _image_column(rows)
    if column is None:
        return [0] * len(rows)
    values = _stored(rows, column)
    feature = rows.features[column]
    if isinstance(feature, Json):
        decoded = [_decoded(value, feature) for value in values.to_pylist()]
        return [len(v) if isinstance(v, list) else int(v is not None) for v in decoded]
    if hasattr(feature, "feature"):
        return pyarrow.compute.fill_null(pyarrow.compute.list_value_length(values), 0).to_pylist()
    return values.is_valid().cast(pyarrow.int64()).to_pylist()


def _encoded(rows: "Dataset", json: bool = True) -> "Dataset":
    """The same rows with images, other media and, if `json`, untyped JSON left as stored: whoever
    decodes media opens whatever paths and URLs the rows name."""
    from datasets import Dataset, DatasetInfo, Features

    features = Features(_undecoded(rows.features, json))
    if features == rows.features:
        return rows
    rows = rows.flatten_indices(keep_in_memory=True) if rows._indices is not None else rows
    info = DatasetInfo(features=features)
    return Dataset(rows.data, info=info, split=rows.split, fingerprint=rows._fingerprint)


def _undecoded(feature: Any, json: bool) -> Any:
    """A feature whose images, other media and, if `json`, untyped JSON are not decoded."""
    from datasets import Json

    if isinstance(feature, Mapping):
        return {name: _undecoded(inner, json) for name, inner in feature.items()}
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature, json))
    if not hasattr(feature, "decode") or (isinstance(feature, Json) and not json):
        return feature
    return dataclasses.replace(feature, decode=False)


def _decoded(value: Any, feature: Any) -> Any:
    """A stored value, its untyped JSON read: `datasets` itself turns a text "3.50" into a number.

    Where it stores a text, that text may be any scalar's JSON; it is then the text itself.
    """
    from datasets import Json

    if value is None:
        return None
    if isinstance(feature, Json):
        try:
            read = json.loads(value)
        except ValueError:
            return value
        return value if read is None or isinstance(read, bool | int | float) else read
    if isinstance(feature, Mapping):
        return {name: _decoded(value[name], inner) for name, inner in feature.items()}
    if hasattr(feature, "feature"):
        return [_decoded(each, feature.feature) for each in value]
    return value


def _features() -> "Features":
    """The columns that a converted row has."""
    from datasets import Features, List, Value

    part = {"type": Value("string"), "text": Value("string")}
    message = {"role": Value("string"), "content": List(part)}
    picture = {"bytes": Value("binary"), "path": Value("string")}
    return Features(
        {"messages": List(List(message)), "pictures": List(picture), "fault": Value("string")}
    )
