# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Write a safetensors file tensor by tensor, part by part: it need not fit into memory.

The file is the same, to the byte, as that of `safetensors.torch.save_file`.
Format: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .atomic_files import atomic_path

Tensor = torch.Tensor

# Of dtypes that weights have, in the order in which safetensors stores them: the widest first.
DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PLACES = {dtype: place for place, dtype in enumerate(DTYPE_NAMES)}
PADDING = 8  # the header ends at a multiple of it


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is made while it is written.

    Attributes:
        shape, dtype: of the whole tensor.
        parts: makes its parts along the first dimension, in order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(
    tensors: Mapping[str, StreamedTensor], path: str | Path, metadata: Mapping[str, str]
) -> None:
    """Write a file of weights, atomically, with one part of one tensor in memory.

    Args:
        tensors: by name.
        path: of the file.
        metadata: of its header.

    Raises:
        ValueError: the parts of a tensor are not those of its shape and dtype.
        OSError: the file cannot be written.
    """
    ordered = sorted(tensors.items(), key=lambda named: (PLACES[named[1].dtype], named[0]))
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(_header(ordered, metadata))
        for name, tensor in ordered:
            start = file.tell()
            for part in tensor.parts():
                if part.dtype != tensor.dtype:
                    raise ValueError(f"A part of {name} is {part.dtype}, not {tensor.dtype}.")
                file.write(
                    part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
                )
            if file.tell() - start != tensor.nbytes:
                raise ValueError(f"The parts of {name} do not make the shape {tensor.shape}.")


def _header(ordered: Iterable[tuple[str, StreamedTensor]], metadata: Mapping[str, str]) -> bytes:
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, tensor in ordered:
        end = start + tensor.nbytes
        fields[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % PADDING)
    return len(text).to_bytes(8, "little") + text
