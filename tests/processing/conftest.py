"""Fixtures of the processor's tests."""

import pytest


@pytest.fixture(scope="session")
def tile(processor) -> int:
    """The side of a tile in pixels."""
    return processor.image_processor.max_image_size["longest_edge"]
