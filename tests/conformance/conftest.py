# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Nothing here is collected by an ordinary run of pytest; `make conformance` names the files."""

import pytest

collect_ignore = ["stand_ins"]

# They draw token ids from the whole vocabulary, the image token among them, or leave images out.
ANY_TOKENS = ("test_ep_", "test_tp_", "test_two_ranks", "rope_scaling", "test_eager_matches_sdpa")


@pytest.fixture(autouse=True)
def image_tokens_without_images(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Switch off, in these tests alone, transformers' checks of values, ours among them."""
    if any(name in request.node.name for name in ANY_TOKENS):
        monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
