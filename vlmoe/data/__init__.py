# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Rows in the wild become conversations, encoded examples and batches.

Read in this order:

- row_fields.py, row_formats.py: the fields of rows, and the forms of other projects;
- loading.py: `load_rows`, the rows of a source (local_files.py, json_rows.py, the Hub, packaged.py)
- packaged.py: datasets that come as packages (easy_vqa.py, emoji.py with openmoji.py for its
  tests); emblems.py draws its own
  as one dataset (images.py, row_datasets.py, augmentation.py);
- rows.py: `as_rows`, rows that are already in Python, and rows by conversation;
- conversations.py: a row, checked and taken apart;
- encoding.py, collator.py: tokens and tiles, cached, and batches of them;
- native_chat.py, native_collator.py, native_rows.py: the same for models of transformers, by their
  own processors;
- long_rows.py, shortening.py, check.py: rows that do not fit, and a report of a whole dataset;
- tokenizer.py, answers.py: a new tokenizer, and a model's answers.
"""

from typing import TYPE_CHECKING

from ..hub.lazy_names import lazy_names

if TYPE_CHECKING:
    from .augmentation import altered_image as altered_image
    from .check import check_rows as check_rows
    from .check import plot_data as plot_data
    from .check import report_text as report_text
    from .collator import PromptBatch as PromptBatch
    from .collator import VLMoECollator as VLMoECollator
    from .collator import VLMoEPreferenceCollator as VLMoEPreferenceCollator
    from .collator import VLMoEPromptCollator as VLMoEPromptCollator
    from .conversations import parse_row as parse_row
    from .images import open_image as open_image
    from .loading import load_rows as load_rows
    from .loading import split_names as split_names
    from .long_rows import length_limit as length_limit
    from .long_rows import usable_rows as usable_rows
    from .native_collator import NativeCollator as NativeCollator
    from .native_collator import NativePromptCollator as NativePromptCollator
    from .row_fields import Message as Message
    from .row_fields import QuestionRow as QuestionRow
    from .row_fields import Row as Row
    from .rows import ConversationRows as ConversationRows
    from .rows import as_rows as as_rows
    from .tokenizer import train_tokenizer as train_tokenizer

# Imported on first use, so that one module of the room does not load all others.
__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "ConversationRows": "rows",
        "Message": "row_fields",
        "NativeCollator": "native_collator",
        "NativePromptCollator": "native_collator",
        "PromptBatch": "collator",
        "QuestionRow": "row_fields",
        "Row": "row_fields",
        "VLMoECollator": "collator",
        "VLMoEPreferenceCollator": "collator",
        "VLMoEPromptCollator": "collator",
        "altered_image": "augmentation",
        "as_rows": "rows",
        "check_rows": "check",
        "length_limit": "long_rows",
        "load_rows": "loading",
        "open_image": "images",
        "parse_row": "conversations",
        "plot_data": "check",
        "report_text": "check",
        "split_names": "loading",
        "train_tokenizer": "tokenizer",
        "usable_rows": "long_rows",
    },
)
