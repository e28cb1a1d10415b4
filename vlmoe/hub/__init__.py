# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Files that are read and written: checks, locks, provenance, the model card, pushes.

Read push_to_hub.py and model_card.py first; whole_model.py and file_checks.py judge folders,
atomic_files.py and folder_lock.py keep them whole.
"""

from typing import TYPE_CHECKING

from .lazy_names import lazy_names

if TYPE_CHECKING:
    from .card_folder import write_card as write_card
    from .export import ExportResult as ExportResult
    from .export import export as export
    from .export import publish_layout as publish_layout
    from .folder_lock import FolderInUseError as FolderInUseError
    from .input_errors import InputError as InputError
    from .model_card import write_model_card as write_model_card
    from .push_to_hub import PushResult as PushResult
    from .push_to_hub import push as push
    from .whole_model import model_problems as model_problems

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "ExportResult": "export",
        "FolderInUseError": "folder_lock",
        "InputError": "input_errors",
        "PushResult": "push_to_hub",
        "export": "export",
        "model_problems": "whole_model",
        "publish_layout": "export",
        "push": "push_to_hub",
        "write_card": "card_folder",
        "write_model_card": "model_card",
    },
)
