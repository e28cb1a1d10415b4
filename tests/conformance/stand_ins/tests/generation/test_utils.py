# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Stands in for a file that no release of transformers holds."""


class GenerationTesterMixin:
    """Without tests; ours of `generate` are in tests/modeling_vlmoe/test_generation.py."""
