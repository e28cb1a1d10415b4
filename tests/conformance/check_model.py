# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""transformers' common tests of models, on `VLMoEModel` and `VLMoEForConditionalGeneration`."""

import unittest
from collections.abc import Callable
from pathlib import Path

import pytest
from testers import ModelTester
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_expert_parallel_mixin import ExpertParallelTesterMixin
from tests.test_modeling_common import ModelTesterMixin
from tests.test_pipeline_mixin import TRANSFORMERS_TINY_MODEL_PATH, PipelineTesterMixin
from tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from transformers import set_seed

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, VLMoEModel


class VLMoEModelTest(
    ModelTesterMixin,
    GenerationTesterMixin,
    PipelineTesterMixin,
    TrainingTesterMixin,
    TensorParallelTesterMixin,
    ExpertParallelTesterMixin,
    unittest.TestCase,
):
    all_model_classes = (VLMoEModel, VLMoEForConditionalGeneration)
    pipeline_model_mapping = {"image-text-to-text": VLMoEForConditionalGeneration}  # noqa: RUF012
    model_tester = None
    _is_composite = True

    @pytest.fixture(autouse=True, scope="class")
    def put_the_tiny_model_in_place(self, saved_model: Path) -> None:
        place = (
            Path(TRANSFORMERS_TINY_MODEL_PATH)
            / VLMoEConfig.model_type
            / VLMoEForConditionalGeneration.__name__
        )
        place.parent.mkdir(exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(saved_model, target_is_directory=True)

    @pytest.fixture(autouse=True)
    def make_testers(self, tiny_config: Callable[..., VLMoEConfig]) -> None:
        set_seed(0)
        self.model_tester = ModelTester(tiny_config)
        self.config_tester = ConfigTester(self, config_class=VLMoEConfig, has_text_modality=False)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()
