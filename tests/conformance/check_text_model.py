# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""transformers' common tests of models, on `VLMoETextModel`."""

import unittest
from collections.abc import Callable

import pytest
from testers import TextModelTester
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin
from tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from transformers import set_seed

from vlmoe import VLMoEConfig, VLMoETextConfig, VLMoETextModel


class VLMoETextModelTest(ModelTesterMixin, TensorParallelTesterMixin, unittest.TestCase):
    all_model_classes = (VLMoETextModel,)
    model_tester = None

    @pytest.fixture(autouse=True)
    def make_testers(self, tiny_config: Callable[..., VLMoEConfig]) -> None:
        set_seed(0)
        self.model_tester = TextModelTester(tiny_config)
        self.config_tester = ConfigTester(self, config_class=VLMoETextConfig)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()
