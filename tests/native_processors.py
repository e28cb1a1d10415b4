"""Tiny processors, made offline, for the vision-language models of `sparse_families.py`."""

import string
from typing import Any

from tokenizers import Tokenizer, decoders, models
from transformers import (
    CLIPImageProcessorPil,
    Ernie4_5_VLMoeImageProcessorPil,
    Ernie4_5_VLMoeProcessor,
    Gemma4ImageProcessorPil,
    Gemma4Processor,
    Glm4vImageProcessorPil,
    Glm4vProcessor,
    GotOcr2ImageProcessorPil,
    InternVLProcessor,
    LlavaProcessor,
    Ovis2ImageProcessorPil,
    Ovis2Processor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessorPil,
    Qwen3VLProcessor,
)

NAMED = ("<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<image>", "<|im_end|>", "<video>")
AROUND = ("<|vision_start|>", "<|vision_end|>", "<|begin_of_video|>", "<|end_of_video|>")
"""Ids 0 to 7 and 8 to 11, as in `sparse_families.py`."""
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{{ 'START<image>END' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'][0]['text'] }}"
    "{{ '<|im_end|>' }}{% endgeneration %}{% else %}{% for p in m['content'] %}"
    "{{ 'START<image>END' if p['type'] == 'image' else p['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ERNIE_MARKS = ("image_start_token", "image_end_token", "video_start_token", "video_end_token")
GRID = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}


class WithoutVideo(ProcessorMixin):
    """Lets parts for video and sound be absent: transformers' video processors need torchvision."""

    def __init__(self, *parts: Any, **named: Any) -> None:
        given = {name: part for name, part in named.items() if part is not None}
        super().__init__(*(part for part in parts if part is not None), **given)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Leave the absent parts out."""
        absent = ("video_processor", "feature_extractor")
        return [name for name in super().get_attributes() if name not in absent]


class TinyQwen3VLProcessor(Qwen3VLProcessor, WithoutVideo):
    """Of Qwen3-VL and Qwen3.5."""


class TinyGlm4vProcessor(Glm4vProcessor, WithoutVideo):
    """Of GLM-4V."""


class TinyGemma4Processor(Gemma4Processor, WithoutVideo):
    """Of Gemma 4."""


class TinyErnieProcessor(Ernie4_5_VLMoeProcessor, WithoutVideo):
    """Of ERNIE-4.5-VL."""


class TinyInternVLProcessor(InternVLProcessor, WithoutVideo):
    """Of InternVL."""


def tiny_tokenizer() -> Any:
    """A tokenizer of single characters; no id is above 127."""
    characters = [each for each in string.printable if each not in "\r\x0b\x0c\t"]
    reserved = [f"<reserved {i}>" for i in range(12, 16)]
    vocab = {name: i for i, name in enumerate((*NAMED, *AROUND, *reserved, *characters))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=[*NAMED[4:], *AROUND],
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<|vision_start|>",
            "eoi_token": "<|vision_end|>",
            "video_token": "<video>",
            "boa_token": "<reserved 13>",
            "eoa_token": "<reserved 14>",
            "audio_token": "<reserved 15>",
            "start_image_token": "<|vision_start|>",
            "end_image_token": "<|vision_end|>",
            "context_image_token": "<image>",
        }
        | dict(zip(ERNIE_MARKS, AROUND, strict=True)),
        chat_template=TEMPLATE.replace("START", "").replace("END", ""),
    )


def tiny_processor(family: str, marked: bool = False) -> Any:
    """The processor of a tiny model, or for a text-only one its tokenizer."""
    tokenizer = tiny_tokenizer()
    start, end = AROUND[:2] if family.startswith(("qwen", "glm")) else ("", "")
    template = (MARKED if marked else TEMPLATE).replace("START", start).replace("END", end)
    if family.startswith("qwen3_vl") or family.startswith("qwen3_5"):
        images = Qwen2VLImageProcessorPil(**GRID, size={"shortest_edge": 64, "longest_edge": 256})
        return TinyQwen3VLProcessor(images, tokenizer, None, chat_template=template)
    if family.startswith("glm4v"):
        images = Glm4vImageProcessorPil(**GRID, size={"shortest_edge": 64, "longest_edge": 512})
        return TinyGlm4vProcessor(images, tokenizer, None, chat_template=template)
    if family == "gemma4":
        images = Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
        return TinyGemma4Processor(None, images, tokenizer, None, chat_template=template)
    if family.startswith("internvl"):
        images = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=False)
        return TinyInternVLProcessor(
            images, tokenizer, None, image_seq_length=4, chat_template=template
        )
    if family.startswith("ernie"):
        sizes = {"shortest_edge": 64, "longest_edge": 512}
        pictures = Ernie4_5_VLMoeImageProcessorPil(patch_size=4, merge_size=2, size=sizes)
        return TinyErnieProcessor(pictures, tokenizer, None, chat_template=template)
    if family == "ovis2":
        pictures = Ovis2ImageProcessorPil(size={"height": 16, "width": 16})
        return Ovis2Processor(pictures, tokenizer, image_seq_length=4, chat_template=template)
    if family.startswith("llava"):
        images = CLIPImageProcessorPil(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
        )
        return LlavaProcessor(
            images,
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    return tokenizer
