# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Models and processors from what the options name: a preset, a saved folder, a Hub id.

Importing this module imports torch and transformers.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe.configuration.configuration_vlmoe import PRESETS
from vlmoe.data.tokenizer import CHAT_TOKENS, END, IMAGE, PAD, tile_markers, train_tokenizer
from vlmoe.hub.input_errors import reading
from vlmoe.hub.json_files import read_json
from vlmoe.hub.saved_model import (
    load_model,
    read_config,
    read_processor,
    require_model_source,
)
from vlmoe.hub.whole_model import weights_problems
from vlmoe.processing.image_sources import DEFAULT_LIMITS, ImageLimits

from .config_overrides import merged, replace_fields, require_known
from .option_parser import close_matches, json_object
from .options import ImageOptions, LoraOptions, ModelOptions, RuntimeOptions

ModelAndProcessor = tuple[VLMoEForConditionalGeneration, VLMoEProcessor]


def model_for_training(
    options: ModelOptions, texts: Callable[[], Iterable[str]], checkpoint: Path | None = None
) -> ModelAndProcessor:
    """The model and processor to train.

    Args:
        options: what to build or load.
        texts: gives the texts of the training data, for a new tokenizer.
        checkpoint: where training goes on; its processor is used, and its weights, which Trainer
            loads, must fit the model that the options describe.

    Raises:
        ValueError: an option has a wrong value, or the checkpoint is of another model.
        FileNotFoundError: there is no such folder.
    """
    overrides = json_object(options.model_overrides, "model_overrides")
    dtype = _dtype(options.dtype)
    processor = None if checkpoint is None else read_processor(checkpoint)
    if is_preset(options.model):
        config, processor = _new_config(options, overrides, texts, processor)
        with _reading_overrides(overrides):
            model = VLMoEForConditionalGeneration(config).to(dtype or torch.float32)
        model.generation_config = GenerationConfig.from_model_config(model.config)
    else:
        check_model_source(options.model)
        if options.tokenizer:
            raise ValueError("--tokenizer is for presets: a saved model keeps its tokenizer.")
        if options.tiling:
            raise ValueError("--tiling is for presets: a saved model keeps its own way.")
        config = read_config(options.model)
        with _reading_overrides(overrides):
            replace_fields(config, overrides)
        processor = processor or read_processor(options.model)
        model = load_model(options.model, config, dtype)
    _choose_implementations(model, options)
    if checkpoint is not None:
        require_same_model(model.config, checkpoint)
    return model, processor


def config_and_processor(
    options: ModelOptions, texts: Callable[[], Iterable[str]]
) -> tuple[VLMoEConfig, VLMoEProcessor]:
    """The config and processor of what the options name, without a model's weights.

    Raises:
        ValueError: an option has a wrong value, or a folder holds no whole model.
        FileNotFoundError: there is no such folder.
    """
    if is_preset(options.model):
        return _new_config(options, {}, texts, None)
    check_model_source(options.model)
    if options.tokenizer:
        raise ValueError("--tokenizer is for presets: a saved model keeps its tokenizer.")
    return read_config(options.model), read_processor(options.model)


def adapter_for_training(options: ModelOptions, lora: LoraOptions) -> tuple[Any, VLMoEProcessor]:
    """A saved model with a new LoRA adapter of its experts, which alone is trained.

    Raises:
        ValueError: the model is a preset, or an option has a wrong value.
        FileNotFoundError: there is no such folder.
    """
    if is_preset(options.model):
        raise ValueError(
            f"--lora adapts a saved model; the preset {options.model!r} would start from nothing. "
            "Give --model a folder or Hub id."
        )
    from vlmoe import add_expert_lora

    model, processor = model_for_training(options, tuple)
    adapted = add_expert_lora(
        model, lora.lora_r, attention=lora.lora_attention, dropout=lora.lora_dropout
    )
    return adapted, processor


def model_for_answers(source: str, options: RuntimeOptions) -> ModelAndProcessor:
    """A saved model in eval mode on its device, and its processor.

    Raises:
        ValueError: the folder holds no whole VLMoE model, or an option has a wrong value.
        FileNotFoundError: there is no such folder.
    """
    check_model_source(source)
    processor = read_processor(source)
    device = options.device or _best_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device!r} cannot be used: {reason}") from error
    model = load_model(source, dtype=_dtype(options.dtype))
    _choose_implementations(model, options)
    return model.eval().to(device), processor


def image_limits(options: ImageOptions, default: ImageLimits = DEFAULT_LIMITS) -> ImageLimits:
    """The limits that the options name, else those of `default`.

    Raises:
        ValueError: a limit is below 1.
    """
    pixels, side = options.max_image_pixels, options.max_image_side
    return ImageLimits(
        default.max_pixels if pixels is None else pixels, default.max_side if side is None else side
    )


def set_image_limits(processor: VLMoEProcessor, options: ImageOptions) -> None:
    """Give the processor the limits of the options, where they name some; raises as they do."""
    limits = image_limits(options, processor.image_limits)
    processor.max_image_pixels, processor.max_image_side = limits.max_pixels, limits.max_side


def is_preset(name: str) -> bool:
    """Whether `name` is that of a preset."""
    return name in preset_names()


def preset_names() -> list[str]:
    """The names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def check_model_source(source: str) -> None:
    """Refuse what cannot be loaded before transformers tries; a Hub id is left to it.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a folder without a whole model, or a word that is neither folder nor preset.
    """
    if source and "/" not in source and not Path(source).expanduser().exists():
        names = preset_names()
        raise ValueError(
            f"{source!r} is neither a preset ({', '.join(names)}) nor a folder"
            f"{close_matches(source, names)}."
        )
    require_model_source(source)


def require_same_model(config: VLMoEConfig, checkpoint: Path) -> None:
    """Refuse a checkpoint whose tensors are not those of `config`: Trainer would skip them.

    Raises:
        ValueError: names the first tensors that differ.
    """
    if problems := list(weights_problems(checkpoint, config)):
        raise ValueError(
            f"The checkpoint {checkpoint} is of another model: {'; '.join(problems)}. Give the "
            "options that it was trained with."
        )


def _new_config(
    options: ModelOptions,
    overrides: dict[str, Any],
    texts: Callable[[], Iterable[str]],
    processor: VLMoEProcessor | None,
) -> tuple[VLMoEConfig, VLMoEProcessor]:
    """The preset's config with the overrides and the tokenizer's ids, and a processor that fits."""
    preset = read_json(PRESETS / f"{options.model}.json")
    with _reading_overrides(overrides):
        require_known(VLMoEConfig(**preset), overrides)
        fields = merged(preset, overrides)
        VLMoEConfig(**fields)  # before a tokenizer is trained for it
    if processor is not None:
        tokenizer = processor.tokenizer
    elif options.tokenizer:
        tokenizer = _chat_tokenizer(options.tokenizer)
    else:
        tokenizer = train_tokenizer(texts(), vocab_size=fields["text_config"]["vocab_size"])
    text = fields["text_config"]
    trained = text["vocab_size"] >= len(tokenizer) and not options.tokenizer
    text["vocab_size"] = text["vocab_size"] if trained else len(tokenizer)
    text |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    fields["image_token_id"] = tokenizer.convert_tokens_to_ids(IMAGE)
    with _reading_overrides(overrides):
        config = VLMoEConfig(**fields)
        if processor is None:
            processor = VLMoEProcessor.for_config(config, tokenizer, tiling=options.tiling)
    return config, processor


def _reading_overrides(overrides: dict[str, Any]) -> AbstractContextManager[None]:
    """What is raised in the block is the fault of `--model_overrides`, if there are some."""
    return reading("--model_overrides") if overrides else nullcontext()


def _chat_tokenizer(source: str) -> Any:
    """A foreign tokenizer with the tokens of our chat format."""
    path = Path(source).expanduser()
    if (path.is_absolute() or source.startswith((".", "~"))) and not path.exists():
        raise FileNotFoundError(f"There is no tokenizer folder {source}.")
    with reading(f"--tokenizer {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.add_tokens([*CHAT_TOKENS, *tile_markers()], special_tokens=True)
        tokenizer.pad_token, tokenizer.eos_token = PAD, END
    tokenizer.chat_template = None
    return tokenizer


def _choose_implementations(
    model: VLMoEForConditionalGeneration, options: ModelOptions | RuntimeOptions
) -> None:
    if options.attn_implementation:
        with reading(f"--attn_implementation {options.attn_implementation}"):
            model.set_attn_implementation(options.attn_implementation)
    if options.experts_implementation:
        with reading(f"--experts_implementation {options.experts_implementation}"):
            model.set_experts_implementation(options.experts_implementation)


def _dtype(name: str | None) -> torch.dtype | None:
    dtype = getattr(torch, name, None) if name else None
    if name and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"--dtype {name!r} is no number type of weights, such as float32.")
    return dtype


def _best_device() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"
