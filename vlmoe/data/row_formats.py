# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Rows in the forms that other projects write, as conversations.

| form | recognized by | becomes |
|---|---|---|
| conversations | `messages`, pictures in `images` | itself, untouched |
| pictures inside the content | a part `{"type": "image", "image" or "path" or "url": ...}` or \
`{"type": "image_url", "image_url": {"url": ...}}` (OpenAI) | the same parts, pictures in `images` |
| markers (LLaMA-Factory, ms-swift) | `messages` of plain texts beside images | `<image>` in a \
turn of user or system becomes an image part; the line break beside it is removed |
| LLaVA, ShareGPT | `conversations` of `{"from": ..., "value": ...}` | a turn each; markers as \
above |
| prompt and completion (TRL) | `prompt`, `completion`: texts, or lists of messages | one \
conversation |
| questions | `question`, `answer` | the images or the video, the question, the answer |
| captions | `text` or `caption` beside an image | the images, the caption |

If no text names an image, the images go before the first user text. A converter is a function of
one row. It passes on values that it does not understand; `parse_row` then refuses them by name.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .images import image_size
from .row_fields import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    MESSAGE_KEYS,
    VIDEO_COLUMNS,
    AnyRow,
    Messages,
    is_list,
    require_known_keys,
    videos_of,
)

MEDIA = ("image", "video")
PICTURE_KEYS = ("image", "path", "url", "image_url", "base64")
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
MARKER = re.compile(r"<image>\n|\n<image>|<image>")

Parts = list[dict[str, Any]]
Picture = str | bytes | dict[str, Any] | None
Converted = tuple[list[Messages], list[Picture]]


@dataclass(frozen=True)
class RowFormat:
    """A form of rows: its name, the columns it is read from, and its converter.

    `convert(row, images, name)` takes the number of images in the row's columns, and returns the
    row's messages and the pictures found inside their content. With `measures` the row that it
    takes has `image_sizes`, too: (width, height) in pixels of each image as it is shown, None where
    it cannot be read.
    """

    name: str
    columns: tuple[str, ...]
    convert: Callable[[AnyRow, int, str], Converted]
    measures: bool = False


RowReader = Callable[[Collection[str], str], RowFormat | None]
"""Takes the columns of rows and what errors call the rows, and returns the form to read them in:
None for rows with `messages` and for unknown ones. `format_of` knows the forms of this file."""


def format_of(columns: Collection[str], source: str = "") -> RowFormat | None:
    """Return the form of rows with these columns, or None for conversations and unknown rows."""
    if "messages" in columns:
        return None
    if "conversations" in columns:
        return RowFormat("LLaVA or ShareGPT conversations", ("conversations",), _turns)
    if "prompt" in columns and "completion" in columns:
        return RowFormat("prompt and completion", ("prompt", "completion"), _completion)
    if "question" in columns and "answer" in columns:
        has_video = any(name in columns for name in VIDEO_COLUMNS)
        convert = _video_question if has_video else _question
        return RowFormat("question and answer", ("question", "answer"), convert)
    caption = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if caption and any(name in columns for name in IMAGE_COLUMNS):
        return RowFormat("captions", (caption,), _caption)
    return None


def conversational(row: AnyRow, name: str, reader: RowReader = format_of) -> AnyRow:
    """Convert a row of any form that `reader` knows to one with `messages` and `images`.

    Conversations, and rows of no known form, are returned unchanged. Videos go to `videos`.

    Raises:
        ValueError: a message has an unknown key, or there are pictures both inside the content and
            in a column; the message starts with `name`.
    """
    form = reader(row.keys(), name)
    if any(each in row for each in VIDEO_COLUMNS):
        others = {each: row[each] for each in row if each not in VIDEO_COLUMNS}
        row = {**others, "videos": videos_of(row)}
    column = next((each for each in IMAGE_COLUMNS if row.get(each) is not None), None)
    if form is None and has_pictures(row.get("messages")):
        form = INSIDE
    if form is None and column and are_plain(row.get("messages")):
        form = MARKED
    if form is None and column in (None, "images"):
        return row
    images = row[column] if column else []
    images = list(images) if is_list(images) else [images]
    if form is None:
        return {**{each: row[each] for each in row if each != column}, "images": images}
    given = {each: row[each] for each in form.columns}
    if form.measures:
        given["image_sizes"] = [image_size(image) for image in images]
    messages, pictures = form.convert(given, len(images), name)
    if pictures and images:
        raise ValueError(f"{name}: {two_places(column)}")
    kept = {each: row[each] for each in row if each not in (*form.columns, *IMAGE_COLUMNS)}
    return {**kept, "messages": messages, "images": pictures or images}


def has_image_parts(messages: object) -> bool:
    """Return whether a `messages` entry, however broken it is, has an image part."""
    if is_list(messages):
        return any(map(has_image_parts, messages))
    content = messages.get("content") if isinstance(messages, Mapping) else None
    return is_list(content) and any(_is_part(part, MEDIA[:1]) for part in content)


def without_image_parts(messages: Any) -> Any:
    """Remove the image and video parts of a `messages` entry; its nesting and its faults stay."""
    if is_list(messages):
        return [without_image_parts(item) for item in messages]
    content = messages.get("content") if isinstance(messages, Mapping) else None
    if not is_list(content):
        return messages
    return {**messages, "content": [part for part in content if not _is_part(part, MEDIA)]}


def _is_part(part: object, kinds: Collection[str]) -> bool:
    return isinstance(part, Mapping) and part.get("type") in kinds


def has_pictures(messages: object) -> bool:
    """Return whether any part of a `messages` entry holds a picture itself."""
    if is_list(messages):
        return any(map(has_pictures, messages))
    content = messages.get("content") if isinstance(messages, Mapping) else None
    return is_list(content) and any(
        isinstance(part, Mapping) and any(part.get(key) is not None for key in PICTURE_KEYS)
        for part in content
    )


def are_plain(messages: object) -> bool:
    """Return whether a conversation, or any of several, has plain texts in place of parts."""
    if not is_list(messages) or not messages:
        return False
    if is_list(messages[0]):
        return any(map(are_plain, messages))
    return all(
        isinstance(each, Mapping) and isinstance(each.get("content"), str) for each in messages
    )


def two_places(column: str | None) -> str:
    """Return the error for pictures both inside the content and in a column."""
    return (
        f"there are pictures inside the content of messages and in the column {column!r}; keep one "
        "of them."
    )


def _chat(row: AnyRow, count: int, name: str) -> Converted:
    """Convert messages whose parts may hold pictures; a row's conversations share them."""
    given = row["messages"]
    several = is_list(given) and bool(given) and is_list(given[0])
    pictures: list[Picture] = []
    conversations = []
    for conversation in given if several else [given]:
        messages, own = _messages(conversation, name)
        if are_plain(conversation):
            messages = _with_images(messages, count)
        conversations.append(messages)
        pictures = pictures or own
        if own and own != pictures:
            raise ValueError(f"{name}: its conversations are about different pictures.")
    return conversations, pictures


def _turns(row: AnyRow, count: int, name: str) -> Converted:
    """Convert LLaVA's and ShareGPT's turns."""
    given = row["conversations"]
    if not is_list(given) or not all(isinstance(turn, dict) for turn in given):
        return [], []
    if any(turn.get("role") is not None for turn in given):
        messages, pictures = _messages(given, name)
        return [messages], pictures
    messages = []
    for turn in given:
        require_known_keys(turn, ("from", "value"), f"{name}: a turn")
        role = _string(turn.get("from"))
        role = SPEAKERS.get(role or "", role)
        content = text_parts(turn.get("value"), marked=role != "assistant")
        messages.append({"role": role, "content": content})
    return [_with_images(messages, count)], []


def _completion(row: AnyRow, count: int, name: str) -> Converted:
    """Convert TRL's prompt and completion."""
    messages: Messages = []
    pictures: list[Picture] = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        if is_list(row[column]):
            more, own = _messages(row[column], name)
            messages, pictures = messages + more, pictures + own
        else:
            messages.append({"role": role, "content": text_parts(row[column])})
    return [messages if pictures else _with_images(messages, count)], pictures


def _question(row: AnyRow, count: int, name: str) -> Converted:
    """Convert a question about the row's images and its answer."""
    return [dialogue(text_parts(row["question"]), text_parts(row["answer"]), count)], []


def _video_question(row: AnyRow, count: int, name: str) -> Converted:
    """Convert a question about the row's video and its answer."""
    (messages,), pictures = _question(row, count, name)
    messages[0]["content"] = [{"type": "video", "text": None}, *(messages[0]["content"] or [])]
    return [messages], pictures


def _caption(row: AnyRow, count: int, name: str) -> Converted:
    """Convert the row's images and their caption."""
    (caption,) = row.values()
    return [dialogue([], text_parts(caption), count)], []


def dialogue(asked: Parts | None, answer: Parts | None, count: int) -> Messages:
    """Return a user turn with `count` images, and the answer."""
    messages: Messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answer},
    ]
    return _with_images(messages, count)


def _with_images(messages: Messages, count: int) -> Messages:
    """Add image parts for the row's `count` images to messages that have none.

    They go to the markers in texts of user and system, or else before the first user text.
    """
    if not count or has_image_parts(messages):
        return messages
    for message in messages:
        if message["role"] != "assistant" and message["content"]:
            texts = [part["text"] for part in message["content"]]
            message["content"] = [part for text in texts for part in _marked_parts(text or "")]
    user = next((message for message in messages if message["role"] == "user"), None)
    if not has_image_parts(messages) and user is not None and user["content"] is not None:
        user["content"] = [{"type": "image", "text": None}] * count + user["content"]
    return messages


def _messages(given: object, name: str) -> tuple[Messages, list[Picture]]:
    """Return messages with their content as parts, and the pictures of those parts in order."""
    messages: Messages = []
    pictures: list[Picture] = []
    for message in given if is_list(given) else []:
        if not isinstance(message, dict):
            messages.append({"role": None, "content": None})
            continue
        require_known_keys(message, MESSAGE_KEYS, f"{name}: a message")
        content = message.get("content")
        if is_list(content):
            content, own = _parts(content, name)
            pictures += own
        else:
            content = text_parts(content)
        messages.append({"role": _string(message.get("role")), "content": content})
    return messages, pictures


def _parts(content: Sequence[object], name: str) -> tuple[Parts, list[Picture]]:
    """Separate the parts of a content from the pictures inside them."""
    parts: Parts = []
    pictures: list[Picture] = []
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


def _picture(key: str, value: Any) -> Picture:
    """Return what a picture key names: a path or URL, `{"bytes", "path"}`, or bytes."""
    if key == "image_url" and isinstance(value, dict):
        return value.get("url")
    if key == "base64" and isinstance(value, str):
        try:
            return {"bytes": base64.b64decode(value, validate=True), "path": None}
        except binascii.Error:
            return value
    return value


def _marked_parts(text: str) -> Parts:
    """Cut a text at its `<image>` markers."""
    parts: Parts = []
    for number, piece in enumerate(MARKER.split(text)):
        parts += [{"type": "image", "text": None}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def text_parts(value: object, marked: bool = False) -> Parts | None:
    """Return a text as parts, cut at image markers if `marked`; None, an error later, without."""
    text = _string(value)
    if text is None:
        return None
    return _marked_parts(text) if marked else [{"type": "text", "text": text}]


def _string(value: object) -> str | None:
    """Return a string, or a number as one; None for anything else."""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return value if isinstance(value, str) else None


INSIDE = RowFormat("pictures inside the content", ("messages",), _chat)
MARKED = RowFormat("texts with <image> markers", ("messages",), _chat)
