# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Models and processors from a name: a preset, a saved folder, a Hub id.

Errors name the argument at fault in backticks; the commands spell it as their option.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..configuration.configuration_vlmoe import PRESETS, VLMoEConfig
from ..data.conversations import parse_row
from ..data.row_fields import AnyRow, did_you_mean
from ..data.tokenizer import CHAT_TOKENS, END, IMAGE, PAD, tile_markers, train_tokenizer
from ..hub.experts_implementation import DEFAULT, parts_with_experts, require_taken
from ..hub.input_errors import reading
from ..hub.json_files import read_json
from ..hub.presets import preset_names
from ..hub.saved_model import (
    Processor,
    load_model,
    read_config,
    read_processor,
    require_model_source,
)
from ..hub.whole_model import weights_problems
from ..modeling_vlmoe.modeling_vlmoe import VLMoEForConditionalGeneration
from ..processing.processing_vlmoe import VLMoEProcessor
from .overrides import Fields, merged, replace_fields, require_known


class ModelAndProcessor(NamedTuple):
    """A model, and the processor that makes its inputs."""

    model: PreTrainedModel
    processor: Processor


class ModelOptions(TypedDict, total=False):
    """How a model is built or loaded to be trained.

    Attributes:
        tokenizer: folder or Hub id of a tokenizer for a preset, in place of a new one.
        tiling: whether a preset's processor cuts large images into tiles.
        model_overrides: fields of the config to replace, nested configs as dicts.
        dtype: number type of the weights, such as "bfloat16"; by default float32 for a preset, and
            the saved one for a saved model.
        attn_implementation: as for `from_pretrained`.
        experts_implementation: as for `from_pretrained`.
    """

    tokenizer: str | None
    tiling: bool
    model_overrides: Fields | None
    dtype: str | None
    attn_implementation: str | None
    experts_implementation: str | None


@dataclass(frozen=True)
class Runtime:
    """Where and how a saved model runs.

    Attributes:
        device: such as "cuda:1"; by default the best one there is.
        dtype: number type of the weights; by default the saved one.
        attn_implementation: as for `from_pretrained`.
        experts_implementation: as for `from_pretrained`.
    """

    device: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    experts_implementation: str | None = None


def build_model(
    name: str,
    texts: Iterable[str] = (),
    processor: Processor | None = None,
    **options: Unpack[ModelOptions],
) -> ModelAndProcessor:
    """Build a preset with random weights, or load a saved model, to be trained.

    Args:
        name: a preset, a folder or a Hub id.
        texts: of the training data; a preset's tokenizer is trained on them.
        processor: in place of a new one, or of the saved one.
        options: see `ModelOptions`.

    Raises:
        ValueError: an argument has a wrong value.
        FileNotFoundError: there is no such folder.
    """
    overrides, weights_dtype = options.get("model_overrides") or {}, _dtype(options.get("dtype"))
    tokenizer, tiling = options.get("tokenizer"), options.get("tiling", False)
    if is_preset(name):
        config, processor = _new_config(name, overrides, texts, tokenizer, tiling, processor)
        with _reading_overrides(overrides):
            model = VLMoEForConditionalGeneration(config).to(weights_dtype or torch.float32)
        model.generation_config = GenerationConfig.from_model_config(model.config)
    else:
        _require_saved(name, tokenizer, tiling)
        config = read_config(name)
        with _reading_overrides(overrides):
            replace_fields(config, overrides)
        processor = processor or read_processor(name)
        model = load_model(name, config, weights_dtype)
    attention, experts = options.get("attn_implementation"), options.get("experts_implementation")
    _choose_implementations(model, attention, experts)
    return ModelAndProcessor(model, processor)


def require_same_model(config: PreTrainedConfig, checkpoint: Path) -> None:
    """Refuse a checkpoint whose tensors are not those of `config`: Trainer would skip them.

    Raises:
        ValueError: names the first tensors that differ.
    """
    if problems := list(weights_problems(checkpoint, config)):
        raise ValueError(
            f"The checkpoint {checkpoint} is of another model: {'; '.join(problems)}. Give the "
            "options that it was trained with."
        )


def config_and_processor(
    name: str, texts: Iterable[str] = (), *, tokenizer: str | None = None, tiling: bool = False
) -> tuple[PreTrainedConfig, Processor]:
    """Return what `build_model` would, with the config in place of the model.

    Raises:
        ValueError: an argument has a wrong value, or a folder holds no whole model.
        FileNotFoundError: there is no such folder.
    """
    if is_preset(name):
        return _new_config(name, {}, texts, tokenizer, tiling, None)
    _require_saved(name, tokenizer, tiling)
    return read_config(name), read_processor(name)


def model_for_answers(source: str, runtime: Runtime = Runtime()) -> ModelAndProcessor:
    """Load a saved model in evaluation mode.

    Raises:
        ValueError: the folder holds no whole model, or an argument has a wrong value.
        FileNotFoundError: there is no such folder.
    """
    check_model_source(source)
    processor, device = read_processor(source), runtime.device
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator is not None else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`device` {device!r} cannot be used: {reason}") from error
    model = load_model(source, dtype=_dtype(runtime.dtype))
    _choose_implementations(model, runtime.attn_implementation, runtime.experts_implementation)
    model.eval().to(device)
    return ModelAndProcessor(model, processor)


def is_preset(name: str) -> bool:
    """Return whether there is a preset of that name."""
    return name in preset_names()


def check_model_source(source: str) -> None:
    """Refuse a source that cannot be loaded before transformers tries; a Hub id is left to it.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a folder without a whole model, or a word that is neither folder nor preset.
    """
    if source and "/" not in source and not Path(source).expanduser().exists():
        names = preset_names()
        raise ValueError(
            f"{source!r} is neither a preset ({', '.join(names)}) nor a folder"
            f"{did_you_mean(source, names)}."
        )
    require_model_source(source)


def row_texts(rows: Iterable[AnyRow]) -> Iterator[str]:
    """Yield every text of every conversation, once per occurrence, in order."""
    for position, row in enumerate(rows):
        for conversation in parse_row(row, position).conversations:
            yield from (turn.text() for turn in conversation)


def _new_config(
    preset: str,
    overrides: Fields,
    texts: Iterable[str],
    tokenizer_source: str | None,
    tiling: bool,
    processor: VLMoEProcessor | None,
) -> tuple[VLMoEConfig, VLMoEProcessor]:
    """Return the preset's config with overrides and token ids, and a processor that fits it."""
    own = read_json(PRESETS / f"{preset}.json")
    with _reading_overrides(overrides):
        require_known(VLMoEConfig(**own), overrides)
        fields = merged(own, overrides)
        VLMoEConfig(**fields)  # before a tokenizer is trained for it
    text = fields["text_config"]
    if processor is not None:
        tokenizer = processor.tokenizer
    elif tokenizer_source:
        tokenizer = _chat_tokenizer(tokenizer_source)
    else:
        tokenizer = train_tokenizer(texts, vocab_size=text["vocab_size"])
    if tokenizer_source or text["vocab_size"] < len(tokenizer):
        text["vocab_size"] = len(tokenizer)
    text |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    fields["image_token_id"] = tokenizer.convert_tokens_to_ids(IMAGE)
    with _reading_overrides(overrides):
        config = VLMoEConfig(**fields)
        if processor is None:
            processor = VLMoEProcessor.for_config(config, tokenizer, tiling=tiling)
    return config, processor


def _chat_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load a foreign tokenizer and add the tokens of our chat format."""
    path = Path(source).expanduser()
    if (path.is_absolute() or source.startswith((".", "~"))) and not path.exists():
        raise FileNotFoundError(f"There is no tokenizer folder {source}.")
    with reading(f"`tokenizer` {source}"):
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.add_tokens([*CHAT_TOKENS, *tile_markers()], special_tokens=True)
        tokenizer.pad_token, tokenizer.eos_token = PAD, END
    tokenizer.chat_template = None
    return tokenizer


def _require_saved(name: str, tokenizer: str | None, tiling: bool) -> None:
    """Refuse a source without a model, and arguments that only a preset reads."""
    check_model_source(name)
    if tokenizer:
        raise ValueError("`tokenizer` is for presets: a saved model keeps its tokenizer.")
    if tiling:
        raise ValueError("`tiling` is for presets: a saved model keeps its own way.")


def _reading_overrides(overrides: Fields) -> AbstractContextManager[None]:
    """Blame `model_overrides`, if there are some, for what is raised in the block."""
    return reading("`model_overrides`") if overrides else nullcontext()


def _choose_implementations(
    model: PreTrainedModel, attention: str | None, experts: str | None
) -> None:
    if attention:
        with reading(f"`attn_implementation` {attention}"):
            model.set_attn_implementation(attention)
    if experts:
        with reading(f"`experts_implementation` {experts}"):
            if experts == DEFAULT:
                require_taken(model)
            for part in parts_with_experts(model):
                part.set_experts_implementation(experts)


def _dtype(name: str | None) -> torch.dtype | None:
    dtype = getattr(torch, name, None) if name else None
    if name and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"`dtype` {name!r} is no number type of weights, such as float32.")
    return dtype
