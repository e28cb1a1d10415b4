# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Digests of file contents, by which prepared data are found again in the cache of `datasets`.

`datasets` itself goes by path, size and time, and would give old rows or old pictures for a file
that has been overwritten. Reading and digesting takes 1 to 2 seconds per GB that is in memory.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def content_digest(files: Iterable[Path | str], *parts: str) -> str:
    """A digest of `parts` and of the contents of the files, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(hashlib.blake2b(part.encode()).digest())
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return digest.hexdigest()
