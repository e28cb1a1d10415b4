# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Videos of rows: finding their files, and their frames in the place of images.

The rules for files and URLs that rows name are those of images (`images.py`). A video is decoded
each time its row is collated, its frames go through the cache of images.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..hub.saved_model import Processor, is_own_processor
from ..processing.image_layout import tiles_on
from ..processing.image_sources import ImageLimits
from ..processing.video_frames import VideoReader
from .conversations import IMAGE, Conversation, ParsedRow, Turn, TurnPart, VideoPlace
from .images import ImageSources, image_files, listed
from .row_fields import VIDEO_COLUMNS, StoredImage, is_list, videos_of

if TYPE_CHECKING:
    from datasets import Dataset

FRAME_TEXTS = {
    "InternVLProcessor": "Frame{number}: ",
    "SmolVLMProcessor": "\nFrame from {clock}:",
}
"""The words before frames in the prompts of other models, see `VideoReader`."""


def video_reader(processor: Processor, limits: ImageLimits, allow_urls: bool) -> VideoReader:
    """Return the reader of videos in rows for a processor; ours has words and limits of its own."""
    if is_own_processor(processor):
        return replace(processor.video_reader, allow_urls=allow_urls)
    text = FRAME_TEXTS.get(type(processor).__name__, "{time}: ")
    return VideoReader(text, limits, allow_urls)


def require_whole_frames(processor: Processor, name: str) -> None:
    """Raise `ValueError` if a processor of transformers would cut frames into tiles."""
    images = getattr(processor, "image_processor", None)
    if images is not None and tiles_on(images, {}):
        raise ValueError(
            f"{name} has videos, and {type(images).__name__} would cut each frame into tiles; "
            "switch that off (do_image_splitting or crop_to_patches)."
        )


def with_frames(parsed: ParsedRow, reader: VideoReader) -> ParsedRow:
    """Replace the videos of a row by their frames: images, each after the text that says when.

    Raises:
        ValueError: a video cannot be used, or the conversations of the row name images and videos
            in different orders or sample them in different ways; the message names row and video.
    """
    if not parsed.videos:
        return parsed
    places = _places(parsed.conversations[0])
    if any(_places(each) != places for each in parsed.conversations):
        raise ValueError(
            f"{parsed.name}: its conversations name images and videos in different orders, or take "
            "different frames; make rows of their own of them."
        )
    media: list[Any] = []
    parts: list[tuple[TurnPart, ...]] = []
    images, videos = iter(parsed.images), iter(parsed.videos)
    for place in places:
        if place is IMAGE:
            media.append(next(images))
            continue
        where = f"{parsed.name}, video {len(parts)}"
        frames = reader.frames(next(videos), where, *place)
        media += [frame for _, frame in frames]
        parts.append(tuple(part for text, _ in frames for part in (text, IMAGE)))
    conversations = [_expanded(each, parts) for each in parsed.conversations]
    return replace(parsed, conversations=conversations, images=media, videos=())


def _places(conversation: Conversation) -> list[VideoPlace | None]:
    return [part for turn in conversation for part in turn.parts if not isinstance(part, str)]


def _expanded(conversation: Conversation, parts: list[tuple[TurnPart, ...]]) -> Conversation:
    remaining = iter(parts)
    return tuple(
        Turn(
            turn.role,
            tuple(
                new
                for part in turn.parts
                for new in (next(remaining) if isinstance(part, VideoPlace) else (part,))
            ),
        )
        for turn in conversation
    )


def stored_video(video: Any, sources: ImageSources, name: str) -> StoredImage | list[Any] | Any:
    """Convert a file to `{"bytes", "path"}`, or a list of frames to a list of these, checked.

    Arrays and opened images come back as they are.

    Raises:
        ValueError, FileNotFoundError: as `ImageSources.entries`.
    """
    if is_list(video):
        frames = enumerate(video)
        return [stored_video(frame, sources, f"{name}, frame {i}") for i, frame in frames]
    is_file = isinstance(video, str | bytes | Mapping) or hasattr(video, "__fspath__")
    return sources.entry(video, name) if is_file else video


def with_video_column(rows: "Dataset", sources: ImageSources, name: str) -> "Dataset":
    """Convert the rows' video column, whichever it is, to `videos`: lists of undecoded videos.

    A video is a file, or a list of frames; all videos of the rows are of one kind.

    Raises:
        ValueError: a file outside the roots, a URL, or both kinds; the message names the row.
        FileNotFoundError: a file does not exist.
    """
    from datasets import Image, List, Video

    column = next((each for each in VIDEO_COLUMNS if each in rows.column_names), None)
    if column is None:
        return rows
    kind, undecoded = rows.features[column], Video(decode=False)
    if undecoded in (kind, getattr(kind, "feature", None)) and not any(image_files(rows, column)):
        return listed(rows, column, "videos", undecoded)
    values = [
        [
            stored_video(video, sources, f"{name}, row {i}, video {j}")
            for j, video in enumerate(videos_of({column: value}))
        ]
        for i, value in enumerate(rows[column])
    ]
    kinds = {isinstance(video, list) for videos in values for video in videos}
    if len(kinds) > 1:
        raise ValueError(
            f"{name}: the column {column!r} holds files in some rows and lists of frames in "
            "others; make data sets of their own of them."
        )
    feature = List(Image(decode=False)) if kinds == {True} else undecoded
    return rows.remove_columns(column).add_column("videos", values, feature=List(feature))
