# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Turn the video parts of a chat into frames: for each a text that says when it is, and an image.

A video is a file (path, bytes, `data:` URL, http(s) URL, or the `{"bytes": ..., "path": ...}` of an
undecoded `datasets` column), or its frames: a list of images, or an array or tensor of shape
(frames, H, W, C) or (frames, C, H, W). PyAV decodes files. What holds for pictures from data holds
for videos: limits of size before decoding, no URL unless allowed, and no container that names other
files or addresses, as playlists do.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from .image_sources import BYTES_PER_PIXEL, ImageError, ImageLimits, ImageSource, encoded_image

VIDEO_KEYS = ("video", "path", "url")
SAMPLING = ("num_frames", "fps")
CONTAINERS = "mov,mp4,matroska,webm,avi,gif,mpegts,mpeg,ogg,flv,asf"
DEFAULT_FRAMES = 8
REMEDY = "Replace the video or leave the sample out."


@dataclass(frozen=True)
class Frame:
    """A frame in the place of an image; it is one tile, even where images are cut into tiles."""

    image: ImageSource


@dataclass(frozen=True)
class VideoReader:
    """Read videos as frames.

    Attributes:
        frame_text: precedes each frame: `{time}` becomes "0.5 s", or "frame 1" where no time is
            known, `{number}` "1", `{clock}` "00:01" (minutes and seconds).
        limits: of a frame; all frames of a video have up to `BYTES_PER_PIXEL` times the pixels.
        allow_urls: whether an http(s) URL is opened.
    """

    frame_text: str
    limits: ImageLimits
    allow_urls: bool = False

    def in_chats(self, chats: Sequence, sampling: Mapping[str, Any]) -> Sequence:
        """Replace the video parts of one conversation or several; others come back as they are.

        Args:
            chats: messages, or a list of such lists.
            sampling: `num_frames` and `fps` of the parts that have none of their own.

        Raises:
            ImageError: a `ValueError` that names sample and video: it is missing, empty, damaged,
                beyond the limits, or of no known kind.
        """
        if not any(map(_has_video, chats)):
            several = bool(chats) and isinstance(chats[0], list | tuple)
            if not several or not any(_has_video(each) for chat in chats for each in chat):
                return chats
            return [self._in_chat(c, sampling, f"sample {i}") for i, c in enumerate(chats)]
        return self._in_chat(chats, sampling, "sample 0")

    def _in_chat(self, chat: Sequence, sampling: Mapping[str, Any], where: str) -> list:
        messages, count = [], 0
        for message in chat:
            if _has_video(message):
                content: list[Any] = []
                for part in message["content"]:
                    if _is_video(part):
                        content += self._parts(part, sampling, f"{where}, video {count}")
                        count += 1
                    else:
                        content.append(part)
                message = {**message, "content": content}
            messages.append(message)
        return messages

    def _parts(
        self, part: Mapping[str, Any], sampling: Mapping[str, Any], where: str
    ) -> list[dict[str, Any]]:
        """Return the text and image parts that a video part becomes."""
        given = {key: value for key, value in part.items() if value is not None}
        unknown = given.keys() - {"type", *VIDEO_KEYS, *SAMPLING}
        sources = [given[key] for key in VIDEO_KEYS if key in given]
        if len(sources) != 1 or unknown:
            raise ImageError(
                f"{where}: the video part has the keys {', '.join(given)}; allowed: one of "
                f"{', '.join(VIDEO_KEYS)} for the video, and {' and '.join(SAMPLING)}."
            )
        own = {key: given[key] for key in SAMPLING if key in given}
        parts: list[dict[str, Any]] = []
        for text, frame in self.frames(sources[0], where, **(own or sampling)):
            parts += [{"type": "text", "text": text}, {"type": "image", "image": frame}]
        return parts

    def frames(
        self, source: Any, where: str, num_frames: int | None = None, fps: float | None = None
    ) -> list[tuple[str, Frame]]:
        """Return the frames of a video, each with the text before it.

        Args:
            source: see the module.
            where: the video's name in errors.
            num_frames: take at most so many frames, evenly spread; of a file 8 by default, of given
                frames all.
            fps: of a file, take so many frames per second; of given frames, the rate at which they
                were taken.

        Raises:
            ImageError: as `in_chats`.
        """
        _check_sampling(num_frames, fps, where)
        images: Sequence[ImageSource]
        if isinstance(source, list | tuple | np.ndarray | torch.Tensor):
            if isinstance(source, np.ndarray | torch.Tensor) and source.ndim != 4:
                raise ImageError(
                    f"{where}: the array of shape {tuple(source.shape)} is no video. Allowed: "
                    "(frames, H, W, C) or (frames, C, H, W)."
                )
            if len(source) == 0:
                raise ImageError(f"{where} has no frames. {REMEDY}")
            chosen = _spread(min(num_frames or len(source), len(source)), len(source))
            images = [source[i] for i in chosen]
            times = [i / fps if fps else None for i in chosen]
        else:
            file, name = self._opened(source, where)
            with file:
                images, times = _decoded(file, name, num_frames, fps, self.limits)
        return [
            (self._text(number, time, where), Frame(image))
            for number, (image, time) in enumerate(zip(images, times, strict=True), 1)
        ]

    def _text(self, number: int, time: float | None, where: str) -> str:
        if time is None and "{clock}" in self.frame_text:
            raise ImageError(
                f"{where}: the text before a frame, {self.frame_text!r}, names its time; give the "
                "rate of the frames as fps."
            )
        minutes, seconds = divmod(int(time or 0), 60)
        values = {
            "{time}": f"frame {number}" if time is None else f"{time:.1f} s",
            "{number}": str(number),
            "{clock}": f"{minutes:02d}:{seconds:02d}",
        }
        text = self.frame_text
        for name, value in values.items():
            text = text.replace(name, value)
        return text

    def _opened(self, source: Any, where: str) -> tuple[BinaryIO, str]:
        """Open a video file, and say what errors call it."""
        if isinstance(source, Mapping):
            source = source.get("path") if source.get("bytes") is None else source["bytes"]
        if isinstance(source, str | Path) and os.path.isfile(source):
            # not by its name, which FFmpeg could read as an address
            return open(source, "rb"), f"{where}: the file {source}"
        if isinstance(source, bytes | bytearray | memoryview):
            return BytesIO(source), f"{where}: the video of {len(source)} bytes"
        options: dict[str, Any] = {"limits": self.limits, "allow_urls": self.allow_urls}
        encoded = encoded_image(source, where, **options) if source is not None else None
        if encoded is None:
            raise ImageError(
                f"{where}: got {type(source).__name__} {source!r:.60}. Allowed: file path, http(s) "
                "URL, base64 string, bytes, list of images, array or tensor."
            )
        name = f"{where}: {encoded.what.replace('the image', 'the video')}"
        return BytesIO(encoded.content), name


def without_sampling(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate `num_frames` and `fps` from the options of a call, its `processor_kwargs` too."""
    inner = options.get("processor_kwargs") or {}
    sampling = {name: each[name] for each in (options, inner) for name in SAMPLING if name in each}
    kept = {name: value for name, value in options.items() if name not in SAMPLING}
    if inner:
        kept["processor_kwargs"] = {k: v for k, v in inner.items() if k not in SAMPLING}
    return kept, sampling


def _decoded(
    file: BinaryIO, name: str, num_frames: int | None, fps: float | None, limits: ImageLimits
) -> tuple[list[Image.Image], list[float | None]]:
    """Decode the chosen frames of a file; their times are seconds from its start."""
    try:
        av = import_module("av")
    except ImportError as error:
        raise ImportError(
            'reading a video file needs PyAV: pip install av, or pip install "vlmoe[video]".'
        ) from error
    if not file.read(1):
        raise ImageError(f"{name} is empty (0 bytes). {REMEDY}")
    file.seek(0)
    images: list[Image.Image] = []
    times: list[float | None] = []
    try:
        with av.open(file, "r", options={"format_whitelist": CONTAINERS}) as container:
            if not container.streams.video:
                raise ImageError(f"{name} has no pictures. {REMEDY}")
            stream = container.streams.video[0]
            width, height = stream.codec_context.width, stream.codec_context.height
            limits.require(width, height, name)
            # Matroska and WebM do not state how many they hold
            total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
            count = num_frames or (DEFAULT_FRAMES if fps is None else total)
            if fps is not None:
                if not stream.average_rate:
                    raise ImageError(f"{name} states no frame rate. Give num_frames, not fps.")
                count = min(count, max(1, int(total / stream.average_rate * fps)))
            chosen = _spread(min(count, total), total)
            _check_pixels(len(chosen), width, height, name, limits)
            container.seek(0)
            last = -1
            for last, frame in enumerate(container.decode(stream)):
                if len(images) < len(chosen) and last == chosen[len(images)]:
                    limits.require(frame.width, frame.height, name)
                    images.append(frame.to_image().rotate(frame.rotation, expand=True))
                    start = (stream.start_time or 0) * (stream.time_base or 0)
                    times.append(None if frame.time is None else float(frame.time - start))
                if len(images) == len(chosen):
                    break
            if not images or len(images) < len(chosen):
                raise ImageError(
                    f"{name} ends after {last + 1} of {total} frames; it is empty, truncated "
                    f"or was trimmed without encoding it anew. {REMEDY}"
                )
    except ImageError:
        raise
    except Exception as error:  # decoders raise almost anything on broken data
        raise ImageError(
            f"{name} cannot be decoded ({type(error).__name__}: {error}). It is truncated, damaged "
            f"or no video. Allowed: {CONTAINERS}. {REMEDY}"
        ) from error
    return images, times


def _check_sampling(num_frames: int | None, fps: float | None, where: str) -> None:
    if num_frames is not None and (
        isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1
    ):
        raise ImageError(f"{where}: `num_frames` is {num_frames!r}; allowed: 1 or more.")
    if fps is not None and not (isinstance(fps, int | float) and 0 < fps < float("inf")):
        raise ImageError(f"{where}: `fps` is {fps!r}; allowed: a number above 0.")


def _check_pixels(count: int, width: int, height: int, name: str, limits: ImageLimits) -> None:
    """Raise `ImageError` for more frames than may be kept decoded."""
    most = BYTES_PER_PIXEL * limits.max_pixels
    if count * width * height > most:
        raise ImageError(
            f"{name}: {count} frames of {width}x{height} pixels are more than {most:,} pixels. "
            "Take fewer (num_frames or fps), or raise the processor's max_image_pixels."
        )


def _spread(count: int, total: int) -> list[int]:
    """Return `count` positions among `total`, as transformers' `default_sample_indices_fn`."""
    return [i * total // count for i in range(count)]


def _is_video(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "video"


def _has_video(message: object) -> bool:
    content = message.get("content") if isinstance(message, Mapping) else None
    return isinstance(content, list | tuple) and any(map(_is_video, content))
