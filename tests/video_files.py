"""Video files that several test files share, written by PyAV."""

import io
from collections.abc import Sequence

import av
import numpy as np

CODECS = {"mp4": "mpeg4", "matroska": "mpeg4", "gif": "gif"}


def gray_levels(count: int, step: int = 8) -> list[int]:
    """Levels of gray, one for each frame of a video."""
    return [number * step for number in range(count)]


def video(
    levels: Sequence[int], rate: int = 8, size: tuple[int, int] = (64, 48), container: str = "mp4"
) -> bytes:
    """Encode a video of evenly gray frames; `size` is (width, height)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as opened:
        stream = opened.add_stream(CODECS[container], rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if container == "gif" else "yuv420p"
        for level in levels:
            pixels = np.full((size[1], size[0], 3), level, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            opened.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        opened.mux(stream.encode())
    return buffer.getvalue()
