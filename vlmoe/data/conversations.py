# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Rows in the conversational form: reading, checking, taking apart.

A row is `{"messages": [...], "images": [...]}`, or has one of the forms of `row_formats.py`.
`messages` is one conversation (a list of turns `{"role": ..., "content": ...}`) or a list of
conversations about the same images. `content` is a string or a list of parts, `{"type": "image"}`,
`{"type": "video"}`, maybe with `num_frames` or `fps`, or `{"type": "text", "text": ...}`. Keys with
the value None, which Arrow adds, count as absent; any other key is an error. Every conversation
names every image and every video (`videos`) of its row once, in order. The optional
`question_type` is a string or one string per conversation; the optional `id` names the row in
errors.

A parsed conversation is a tuple of `Turn`s: hashable, so that it can be a cache key.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..processing.text_checks import require_characters
from ..processing.video_frames import VIDEO_KEYS, Frame
from .row_fields import (
    MESSAGE_KEYS,
    AnyRow,
    Message,
    Part,
    RowImage,
    RowVideo,
    did_you_mean,
    is_list,
    require_known_keys,
    require_messages,
)
from .row_formats import conversational, has_image_parts

ROLES = ("system", "user", "assistant")
IMAGE = None
"""Stands for an image among the parts of a `Turn`; text parts are strings."""
PART_KEYS = {"text": ("type", "text"), "image": ("type",), "video": ("type", "num_frames", "fps")}


class VideoPlace(NamedTuple):
    """Stands for a video among the parts of a `Turn`, until `with_frames` replaces it."""

    num_frames: int | None
    fps: float | None


TurnPart = str | None | VideoPlace


class Turn(NamedTuple):
    """One message: its speaker and its parts, each a string, `IMAGE` or a `VideoPlace`."""

    role: str
    parts: tuple[TurnPart, ...]

    def text(self) -> str:
        """Join the text parts."""
        return "".join(part for part in self.parts if isinstance(part, str))

    def as_message(self) -> Message:
        """Return the message as a chat template takes it."""
        content: list[Part] = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
            for part in self.parts
        ]
        return {"role": self.role, "content": content}  # type: ignore[typeddict-item]


Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class ParsedRow:
    """A checked dataset row; `question_types` has one entry per conversation, "" for none."""

    name: str
    conversations: list[Conversation]
    images: Sequence[RowImage | Frame]
    question_types: list[str]
    videos: Sequence[RowVideo] = ()


def parse_row(row: AnyRow, position: int) -> ParsedRow:
    """Check a row and take it apart.

    Raises:
        ValueError: the row does not have a known form; the message names it by its `id`, or else by
            its `position` in the batch, and by its first question.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"row {position} of the batch is a {type(row).__name__}, not a mapping.")
    name = row_name(row, position)
    row = _conversational(row, name)
    conversations = _parse_messages(row, name)
    images, videos = row.get("images"), row.get("videos")
    images = [] if images is None else images
    videos = () if videos is None else videos
    for kind, given, count in (("image", images, count_images), ("video", videos, count_videos)):
        if not is_list(given):
            raise ValueError(f"{name}: `{kind}s` must be a list, got {type(given).__name__}.")
        for named in map(count, conversations):
            if named != len(given):
                raise ValueError(
                    f"{name}: a conversation has {named} {kind} parts, but the row has "
                    f'{len(given)} {kind}s; give one {{"type": "{kind}"}} part per {kind}, in '
                    "order."
                )
    types = _question_types(row.get("question_type"), len(conversations), name)
    return ParsedRow(name, conversations, images, types, videos)


def parse_messages(row: AnyRow, name: str) -> list[Conversation]:
    """Check the conversations of a row called `name`, its images aside."""
    return _parse_messages(_conversational(row, name), name)


def _conversational(row: AnyRow, name: str) -> AnyRow:
    """Convert a row of another form; the common row, with images and image parts, skips this."""
    if row.get("images") and has_image_parts(row.get("messages")):
        return row
    return conversational(row, name)


def _parse_messages(row: AnyRow, name: str) -> list[Conversation]:
    """Check the conversations of a row with `messages`."""
    require_messages(row, name)
    messages = row["messages"]
    if not is_list(messages) or not messages:
        raise ValueError(
            f"{name}: `messages` must be a list of messages or of conversations, got "
            f"{messages!r:.80}; its columns are {sorted(row)}."
        )
    return [_parse_conversation(each, name) for each in split_conversations(messages)]


def row_name(row: AnyRow, position: int) -> str:
    """Name a row in errors: by its `id` or its position in the batch, and its first question."""
    name = f"row {row['id']!r}" if row.get("id") is not None else f"row {position} of the batch"
    question = next(_user_texts(row.get("messages")), row.get("question"))
    return f"{name} ({question[:60]!r})" if isinstance(question, str) else name


def split_conversations(messages: Sequence[Any]) -> Sequence[Any]:
    """Return the conversations of a `messages` entry: itself, if it is a list of lists."""
    several = is_list(messages) and bool(messages) and is_list(messages[0])
    return messages if several else [messages]


def count_images(conversation: Conversation) -> int:
    """Count the image parts of a conversation."""
    return sum(turn.parts.count(IMAGE) for turn in conversation)


def count_videos(conversation: Conversation) -> int:
    """Count the video parts of a conversation."""
    return sum(isinstance(part, VideoPlace) for turn in conversation for part in turn.parts)


def split_reference(conversation: Conversation, name: str) -> tuple[Conversation, str]:
    """Split off the last turn; return the conversation without it, and its text, the reference.

    Raises:
        ValueError: the last turn is not the assistant's; the message names the row.
    """
    if conversation[-1].role != "assistant":
        raise ValueError(
            f"{name}: the last message must be the assistant's, to serve as the reference answer; "
            f"it is the {conversation[-1].role}'s."
        )
    return conversation[:-1], conversation[-1].text()


def _parse_conversation(messages: object, name: str) -> Conversation:
    """Check one conversation."""
    if not is_list(messages) or not messages:
        raise ValueError(
            f"{name}: a conversation must be a list of messages, got {messages!r:.80}."
        )
    turns = tuple([_parse_turn(message, name) for message in messages])
    roles = [turn.role for turn in turns]
    if "user" not in roles:
        raise ValueError(f"{name}: a conversation has no user turn; its roles are {roles}.")
    return turns


def _parse_turn(message: object, name: str) -> Turn:
    """Check one message."""
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
    if not is_list(content):
        raise ValueError(
            f"{name}: the content of the {role} turn must be a string or a list of parts, got "
            f"{content!r:.80}."
        )
    parts = tuple([_parse_part(part, name) for part in content])
    if role == "assistant" and not all(isinstance(part, str) for part in parts):
        kind = "an image" if IMAGE in parts else "a video"
        raise ValueError(f"{name}: an assistant turn holds {kind}; only text can be learned.")
    return Turn(role, parts)


def _parse_part(part: object, name: str) -> TurnPart:
    """Return a text part's string, `IMAGE` or a `VideoPlace`."""
    given = part if isinstance(part, dict) else {}
    kind, text = str(given.get("type")), given.get("text")
    known = PART_KEYS.get(kind, ())
    if kind == "video" and any(given.get(key) is not None for key in VIDEO_KEYS):
        raise ValueError(
            f"{name}: a video part of a row marks its place alone, got {part!r:.80}; put the video "
            "in the row's `videos`."
        )
    if known and (kind == "video" or len(given) > len(known)):
        require_known_keys(given, known, f"{name}: a part of type {kind!r}")
    if kind == "text" and isinstance(text, str):
        require_characters(text, name)
        return text
    if kind == "image":
        return IMAGE
    if kind == "video":
        return VideoPlace(given.get("num_frames"), given.get("fps"))
    raise ValueError(
        f"{name}: unknown content part {part!r:.80}; allowed are "
        '{"type": "image"}, {"type": "video"} and {"type": "text", "text": "..."}.'
    )


def _question_types(value: object, count: int, name: str) -> list[str]:
    """Return one question type per conversation, "" for none."""
    if value is None or isinstance(value, str):
        return [value or ""] * count
    if not is_list(value) or len(value) != count:
        raise ValueError(
            f"{name}: `question_type` must be a string or one string per conversation ({count}), "
            f"got {value!r:.80}."
        )
    return [kind or "" for kind in value]


def _user_texts(messages: object) -> Iterator[str]:
    """Yield the texts of the user turns of any `messages` value, however broken it is."""
    if is_list(messages):
        for item in messages:
            yield from _user_texts(item)
    elif isinstance(messages, Mapping) and messages.get("role") == "user":
        content = messages.get("content")
        parts = content if is_list(content) else [{"text": content}]
        for part in parts:
            text = part.get("text") if isinstance(part, Mapping) else None
            if isinstance(text, str):
                yield text
