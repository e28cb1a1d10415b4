# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Load a model only to judge it, by the headers of its files; silence what libraries show."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_accelerate_available
from transformers.utils import logging as transformers_logging


def meta_device_map() -> str | None:
    """Return the `device_map` that loads headers only.

    None, which loads the weights, where transformers takes no device map.
    """
    can = is_accelerate_available() and not is_deepspeed_zero3_enabled()
    return "meta" if can else None


@contextmanager
def quietly() -> Iterator[None]:
    """Silence warnings and progress bars: the real loading repeats all of them."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with without_bars():
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def without_bars() -> Iterator[None]:
    """Show no progress bars of transformers."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
