# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""transformers' tensor-parallel tests on `VLMoEForConditionalGeneration`, on two CPU processes.

The mixin runs them for the model types of its own list only, all or none, and one of them loads a
float8 config for linear layers, which our model refuses as it would leave the experts as they are.
So the mixin skips them in check_model.py, and here are the others: what they run, called by us.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from testers import ModelTester
from tests.distributed_testing_utils import run_distributed

from tests import test_tensor_parallel_mixin as mixin
from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration

TOLERANCE = mixin.TensorParallelTesterMixin.tensor_parallel_atol
RANKS = mixin.TensorParallelTesterMixin.tensor_parallel_size
NEW_TOKENS = 25


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def saved(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_config: Callable[..., VLMoEConfig]
) -> Path:
    config = ModelTester(tiny_config).get_config()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = request.param
    torch.manual_seed(0)
    VLMoEForConditionalGeneration(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "implementation, more",
    [
        (mixin._test_tp_forward_impl, ()),
        (mixin._test_tp_backward_impl, ()),
        (mixin._test_tp_generation_impl, (NEW_TOKENS,)),
    ],
    ids=["forward", "backward", "generation"],
)
def test_two_ranks_equal_one(
    implementation: Callable[..., None], more: tuple[Any, ...], saved: Path
) -> None:
    run_distributed(RANKS)(implementation)(
        str(saved), VLMoEForConditionalGeneration, TOLERANCE, TOLERANCE, *more
    )
