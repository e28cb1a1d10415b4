# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Calibration rows and evaluation rows must be different rows."""

import hashlib
from typing import TYPE_CHECKING

from PIL import Image

from ..data.row_fields import AnyRow, Rows
from ..data.rows import ConversationRows

if TYPE_CHECKING:
    import datasets


def require_apart(
    calibration: "Rows | datasets.Dataset", evaluation: "Rows | datasets.Dataset"
) -> None:
    """Refuse calibration rows that are evaluation rows too.

    Raises:
        ValueError: names the first one.
    """
    asked = ConversationRows(evaluation)
    known = {row_digest(asked[i]) for i in range(len(asked))}
    given = ConversationRows(calibration)
    shared = [i for i in range(len(given)) if row_digest(given[i]) in known]
    if shared:
        raise ValueError(
            f"{len(shared)} of {len(given)} calibration rows are evaluation rows, too (the first: "
            f"row {shared[0]}): the accuracy would be that of rows that the model was fitted to. "
            "Give other rows to one of the two."
        )


def row_digest(row: AnyRow) -> bytes:
    """Return a digest of a conversation's words and images."""
    digest = hashlib.sha256(repr(_without_images(row["messages"])).encode())
    for image in row.get("images") or ():
        if isinstance(image, Image.Image):
            digest.update(repr(image.size).encode() + image.tobytes())
        elif isinstance(image, dict):
            digest.update(image.get("bytes") or str(image.get("path")).encode())
        else:
            digest.update(image if isinstance(image, bytes) else str(image).encode())
    return digest.digest()


def _without_images(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_images(v) for k, v in value.items() if k != "image"}
    return [_without_images(each) for each in value] if isinstance(value, list) else value
