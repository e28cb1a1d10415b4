# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Stands in for a file that no release of transformers holds."""

from typing import Any

import numpy as np
from PIL import Image
from transformers import ImageTextToTextPipeline

NEW_TOKENS = 5


class ImageTextToTextPipelineTests:
    """What `PipelineTesterMixin` asks about the task: a pipeline, examples, and a check of both."""

    def get_test_pipeline(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any = None,
        processor: Any = None,
        dtype: str = "float32",
    ) -> tuple[ImageTextToTextPipeline, list[dict[str, Any]]]:
        pipeline = ImageTextToTextPipeline(
            model=model, processor=processor, dtype=dtype, max_new_tokens=NEW_TOKENS
        )
        pixels = np.random.default_rng(0).integers(0, 256, (2, 24, 20, 3), np.uint8)
        images = [Image.fromarray(image) for image in pixels]
        texts = ["This is a ", "What color is the shape?"]
        return pipeline, [
            {"images": image, "text": f"{processor.image_token}{text}"}
            for image, text in zip(images, texts, strict=True)
        ]

    def run_pipeline_test(
        self, pipeline: ImageTextToTextPipeline, examples: list[dict[str, Any]]
    ) -> None:
        for example in examples:
            (output,) = pipeline(example["images"], text=example["text"])
            assert output["input_text"] == example["text"]
            inputs = pipeline.processor(
                images=[example["images"]], text=[example["text"]], return_tensors="pt"
            )
            inputs = inputs.to(dtype=pipeline.model.dtype)
            tokens = pipeline.model.generate(**inputs, max_new_tokens=NEW_TOKENS)
            new_text = pipeline.processor.decode(
                tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            assert output["generated_text"].endswith(new_text)
