# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Dataset rows in the conversational form: reading, checking, taking apart.

A row is `{"messages": [...], "images": [...]}`, or has one of the forms of `row_formats.py`.
`messages` is one conversation (a list of turns `{"role": ..., "content": ...}`) or a list of
conversations about the same images. `content` is a string or a list of parts, `{"type": "image"}`
or `{"type": "text", "text": ...}`; keys with the value None, which Arrow adds, count as absent, and
any other key is an error. Every conversation names every image of its row once, in order.
`question_type`, optional, is a string or one string per conversation; `id`, optional, names the row
in messages.

Here each conversation becomes a tuple of `Turn`s: hashable, so that it can be a cache key.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, TypedDict, TypeGuard

from ..processing.text_checks import require_characters
from .field_names import did_you_mean, misspelled

ROLES = ("system", "user", "assistant")
IMAGE = None
"""Stands for an image among the parts of a `Turn`; text parts are strings."""
COLUMNS = ("messages", "images", "question_type")
MESSAGE_KEYS = ("role", "content")
LOSS_KEYS = ("weight", "loss", "train")
LEARNED_ROLES = ("assistant", "gpt", "chatgpt", "model")
PART_KEYS = {"text": ("type", "text"), "image": ("type",)}
IMAGE_COLUMNS = ("images", "image", "file_name")
CAPTION_COLUMNS = ("text", "caption")
OTHER_COLUMNS = ("conversations", "prompt", "completion", "question", "answer")
NEEDED = (
    "Needed are `messages` (conversations) and, for images, `images` (a list of images per row), "
    "or `question` and `answer`, `conversations` (LLaVA, ShareGPT), `prompt` and `completion`, or "
    "`text` beside an image."
)
REMOVED = (
    "If the dataset has these columns, Trainer removed them: set remove_unused_columns=False in "
    "TrainingArguments."
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    RowImage = (
        str | os.PathLike[str] | bytes | Image.Image | np.ndarray | torch.Tensor | Mapping[str, Any]
    )

AnyRow = Mapping[str, Any]
"""A row of any form, as a dict; `Row` and `QuestionRow` are the two common ones."""


class Part(TypedDict):
    """A piece of a message: a text, or the place of the row's next image."""

    type: Literal["text", "image"]
    text: NotRequired[str | None]


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Sequence[Part]


class Row(TypedDict):
    """Conversations about the same images."""

    messages: Sequence[Message] | Sequence[Sequence[Message]]
    images: NotRequired["Sequence[RowImage]"]
    id: NotRequired[str]
    question_type: NotRequired[str | Sequence[str]]


class QuestionRow(TypedDict):
    """One question, about an image, several (`images`) or none, and its answer."""

    question: str
    answer: str
    image: NotRequired["RowImage | None"]
    images: NotRequired["Sequence[RowImage]"]
    id: NotRequired[str]
    question_type: NotRequired[str]


class Turn(NamedTuple):
    """One message: who speaks, and its parts (a string, or `IMAGE`)."""

    role: str
    parts: tuple[str | None, ...]

    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.parts if part is not IMAGE)

    def as_message(self) -> dict[str, Any]:
        """The message as a chat template takes it."""
        content = [
            {"type": "image"} if part is IMAGE else {"type": "text", "text": part}
            for part in self.parts
        ]
        return {"role": self.role, "content": content}


Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class ParsedRow:
    """A checked dataset row; `question_types` has one entry per conversation, "" for none."""

    name: str
    conversations: list[Conversation]
    images: Sequence[Any]
    question_types: list[str]


def parse_row(row: Mapping[str, Any], position: int) -> ParsedRow:
    """Check a row and take it apart.

    Raises `ValueError` naming the row (by its `id`, else by `position` in the batch, and by its
    first question) when it does not follow the form that this module describes.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"row {position} of the batch is a {type(row).__name__}, not a mapping.")
    name = row_name(row, position)
    row = _conversational(row, name)
    conversations = _parse_messages(row, name)
    images = row.get("images")
    images = [] if images is None else images
    if not _is_list(images):
        raise ValueError(f"{name}: `images` must be a list, got {type(images).__name__}.")
    for conversation in conversations:
        named = count_images(conversation)
        if named != len(images):
            raise ValueError(
                f"{name}: a conversation has {named} image parts, but the row has {len(images)} "
                'images; give one {"type": "image"} part per image, in order.'
            )
    types = _question_types(row.get("question_type"), len(conversations), name)
    return ParsedRow(name, conversations, images, types)


def parse_messages(row: Mapping[str, Any], name: str) -> list[Conversation]:
    """The checked conversations of a row called `name`, its images aside."""
    return _parse_messages(_conversational(row, name), name)


def _conversational(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The row with `messages` and `images`, if it has the form of another project."""
    if row.get("images") and has_image_parts(row.get("messages")):
        return row
    from .row_formats import conversational  # it builds on this module

    return conversational(row, name)


def _parse_messages(row: Mapping[str, Any], name: str) -> list[Conversation]:
    """The checked conversations of `messages`."""
    require_messages(row, name)
    messages = row["messages"]
    if not _is_list(messages) or not messages:
        raise ValueError(
            f"{name}: `messages` must be a list of messages or of conversations, got "
            f"{messages!r:.80}; its columns are {sorted(row)}."
        )
    return [_parse_conversation(each, name) for each in split_conversations(messages)]


def require_messages(row: AnyRow, name: str) -> None:
    """Raise `ValueError` for a row without `messages`, and for a misspelled column."""
    require_known_columns(row.keys(), name)
    if "messages" not in row:
        raise ValueError(
            f"{name} has no `messages`; its columns are {sorted(map(str, row))}. {NEEDED} {REMOVED}"
        )


def require_known_columns(columns: Collection[str], name: str, also: tuple[str, ...] = ()) -> None:
    """Raise `ValueError` for a column that is almost a known one, or one of `also`."""
    known = COLUMNS
    if "messages" not in columns:
        known = (*COLUMNS, *OTHER_COLUMNS, *IMAGE_COLUMNS, *CAPTION_COLUMNS)
    wrong = misspelled(tuple(columns), (*also, *known))
    if wrong is not None:
        raise ValueError(
            f"{name}: the column {wrong[0]!r} is not read (did you mean {wrong[1]!r}?); rename or "
            "remove it."
        )


def require_known_keys(given: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    """Raise `ValueError` for a key with a value that is none of `known`: it would be lost.

    A turn may say whether it is learned (`weight`, `loss`, `train`), if it says what is done.
    """
    learned = given.get("role", given.get("from")) in LEARNED_ROLES
    for key, value in given.items():
        if key in LOSS_KEYS and value in (0, 1) and bool(value) == learned:
            continue
        if key not in known and value is not None:
            raise ValueError(
                f"{what} has the key {key!r}, which is not read{did_you_mean(str(key), known)}; "
                f"its keys are {' and '.join(f'`{each}`' for each in known)}. Remove it."
            )


def row_name(row: Mapping[str, Any], position: int) -> str:
    """How errors call a row: its `id` or its position in the batch, and its first question."""
    name = f"row {row['id']!r}" if row.get("id") is not None else f"row {position} of the batch"
    question = next(_user_texts(row.get("messages")), row.get("question"))
    return f"{name} ({question[:60]!r})" if isinstance(question, str) else name


def split_conversations(messages: Sequence[Any]) -> Sequence[Any]:
    """The conversations of a `messages` entry: itself, if it is a list of lists."""
    several = _is_list(messages) and bool(messages) and _is_list(messages[0])
    return messages if several else [messages]


def count_images(conversation: Conversation) -> int:
    """The number of image parts of a conversation."""
    return sum(turn.parts.count(IMAGE) for turn in conversation)


def split_reference(conversation: Conversation, name: str) -> tuple[Conversation, str]:
    """The conversation without its last turn, and that turn's text, the reference answer.

    Raises `ValueError` naming the row when the last turn is not the assistant's.
    """
    if conversation[-1].role != "assistant":
        raise ValueError(
            f"{name}: the last message must be the assistant's, to serve as the reference answer; "
            f"it is the {conversation[-1].role}'s."
        )
    return conversation[:-1], conversation[-1].text()


def without_image_parts(messages: Any) -> Any:
    """A `messages` entry with every image part taken out, its nesting and its faults kept."""
    if _is_list(messages):
        return [without_image_parts(item) for item in messages]
    content = messages.get("content") if isinstance(messages, Mapping) else None
    if not _is_list(content):
        return messages
    return {**messages, "content": [part for part in content if not _is_image_part(part)]}


def has_image_parts(messages: Any) -> bool:
    """Whether a `messages` entry, however broken it is, holds any image part."""
    if _is_list(messages):
        return any(map(has_image_parts, messages))
    content = messages.get("content") if isinstance(messages, Mapping) else None
    return _is_list(content) and any(map(_is_image_part, content))


def _is_image_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def _parse_conversation(messages: Any, name: str) -> Conversation:
    """One conversation as a tuple of turns, checked."""
    if not _is_list(messages) or not messages:
        raise ValueError(
            f"{name}: a conversation must be a list of messages, got {messages!r:.80}."
        )
    turns = tuple([_parse_turn(message, name) for message in messages])
    roles = [turn.role for turn in turns]
    if "user" not in roles:
        raise ValueError(f"{name}: a conversation has no user turn; its roles are {roles}.")
    return turns


def _parse_turn(message: Any, name: str) -> Turn:
    """One message as a `Turn`, checked."""
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        near = ""
        if isinstance(message, dict):
            lacking = [key for key in MESSAGE_KEYS if key not in message]
            near = next(filter(None, (did_you_mean(str(key), lacking) for key in message)), "")
        raise ValueError(
            f"{name}: a message needs `role` and `content`, got {message!r:.80}{near}."
        )
    if len(message) > len(MESSAGE_KEYS):
        require_known_keys(message, MESSAGE_KEYS, f"{name}: a message")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{name}: unknown role {role!r}; allowed are {', '.join(ROLES)}.")
    if isinstance(content, str):
        require_characters(content, name)
        return Turn(role, (content,))
    if not _is_list(content):
        raise ValueError(
            f"{name}: the content of the {role} turn must be a string or a list of parts, got "
            f"{content!r:.80}."
        )
    parts = tuple([_parse_part(part, name) for part in content])
    if role == "assistant" and IMAGE in parts:
        raise ValueError(f"{name}: an assistant turn holds an image; only text can be learned.")
    return Turn(role, parts)


def _parse_part(part: Any, name: str) -> str | None:
    """A text part's string, or `IMAGE`."""
    kind = str(part.get("type")) if isinstance(part, dict) else ""
    known = PART_KEYS.get(kind, ())
    if known and len(part) > len(known):
        require_known_keys(part, known, f"{name}: a part of type {kind!r}")
    if kind == "text" and isinstance(part.get("text"), str):
        require_characters(part["text"], name)
        return part["text"]
    if kind == "image":
        return IMAGE
    raise ValueError(
        f"{name}: unknown content part {part!r:.80}; allowed are "
        '{"type": "image"} and {"type": "text", "text": "..."}.'
    )


def _question_types(value: Any, count: int, name: str) -> list[str]:
    """One question type per conversation, "" for none."""
    if value is None or isinstance(value, str):
        return [value or ""] * count
    if not _is_list(value) or len(value) != count:
        raise ValueError(
            f"{name}: `question_type` must be a string or one string per conversation ({count}), "
            f"got {value!r:.80}."
        )
    return [kind or "" for kind in value]


def _user_texts(messages: Any) -> Iterator[str]:
    """The texts of the user turns of any `messages` value, however broken it is."""
    if _is_list(messages):
        for item in messages:
            yield from _user_texts(item)
    elif isinstance(messages, Mapping) and messages.get("role") == "user":
        content = messages.get("content")
        parts: Sequence[Any] = content if _is_list(content) else [{"text": content}]
        for part in parts:
            text = part.get("text") if isinstance(part, Mapping) else None
            if isinstance(text, str):
                yield text


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    """Whether a value is a list in the sense of a dataset row."""
    return isinstance(value, (list, tuple))
