"""What several test files build or measure in the same way."""

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the storages behind a tensor, those inside a tensor subclass included."""
    if is_traceable_wrapper_subclass(tensor):
        return sum(stored_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.untyped_storage().nbytes()
