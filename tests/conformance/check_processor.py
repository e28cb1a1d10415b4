# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""transformers' common tests of processors, on `VLMoEProcessor`."""

import unittest
from typing import Any

from tests.test_processing_common import ProcessorTesterMixin
from transformers import Idefics3ImageProcessor

from vlmoe import VLMoEProcessor
from vlmoe.data.tokenizer import train_tokenizer

TEXTS = ["lower newer upper older longer string", "describe this image"] * 3


class VLMoEProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = VLMoEProcessor

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return train_tokenizer(TEXTS, vocab_size=320)

    @classmethod
    def _setup_image_processor(cls) -> Any:
        return Idefics3ImageProcessor(size={"longest_edge": 64}, do_image_splitting=False)

    @staticmethod
    def prepare_processor_dict() -> dict[str, Any]:
        return {"image_seq_len": 4}
