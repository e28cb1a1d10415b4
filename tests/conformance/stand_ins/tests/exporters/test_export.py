# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Stands in for a file that no release of transformers holds."""


class ExportTesterMixin:
    """Without tests."""
