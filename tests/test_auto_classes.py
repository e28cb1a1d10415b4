"""What Auto classes and other libraries take VLMoE for: an image-text-to-text model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, expert_lora_config


@pytest.mark.parametrize(
    "auto_class", [AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM]
)
def test_each_auto_class_loads_the_whole_model(saved_model: Path, auto_class: Any) -> None:
    model, info = auto_class.from_pretrained(saved_model, output_loading_info=True)
    assert type(model) is VLMoEForConditionalGeneration
    assert not any(info.values())


def test_peft_loads_an_adapter_with_its_base_model(saved_model: Path, tmp_path: Path) -> None:
    base = AutoModelForImageTextToText.from_pretrained(saved_model)
    adapted = get_peft_model(base, expert_lora_config(base, r=2, attention=True)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(saved_model).save_pretrained(tmp_path)  # PEFT looks at the size
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, PeftModel)
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits)


def test_the_pipeline_loads_it_by_name(saved_model: Path) -> None:
    pipe = pipeline("image-text-to-text", model=str(saved_model))
    assert type(pipe.model) is VLMoEForConditionalGeneration
    assert pipe.processor is not None
    text = [{"role": "user", "content": [{"type": "text", "text": "is it red?"}]}]
    assert (
        pipe(text=text, max_new_tokens=2, return_full_text=False)[0]["generated_text"] is not None
    )


def test_the_text_pipeline_writes_what_generate_does(saved_model: Path) -> None:
    pipe = pipeline("text-generation", model=str(saved_model))
    assert type(pipe.model) is VLMoEForConditionalGeneration
    processor = AutoProcessor.from_pretrained(saved_model)
    texts = ["is it red?", "what color is the shape?"]
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
    expected = []
    for text in (*texts, *prompts):
        inputs = processor.tokenizer(text, return_tensors="pt")
        ids = pipe.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        expected.append(processor.decode(ids[0, inputs.input_ids.shape[1] :], True))
    options = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    for given, wanted in ((texts, expected[:2]), (chats, expected[2:])):
        for batch_size in (1, 2):
            answers = pipe(given, batch_size=batch_size, **options)
            assert [answer[0]["generated_text"] for answer in answers] == wanted


def test_other_libraries_still_take_it_for_a_vision_language_model(saved_model: Path) -> None:
    """TRL goes by the processor and the architecture, lm-eval and Trainer by these tables."""
    from trl.trainer.utils import create_model_from_path

    assert "vlmoe" not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert "vlmoe" not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    name = "VLMoEForConditionalGeneration"
    assert name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    own = [key for key in VLMoEConfig.hub_classes if key.startswith("AutoModelFor")]
    assert own[0] == "AutoModelForImageTextToText"
    assert type(create_model_from_path(str(saved_model))) is VLMoEForConditionalGeneration
