# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Read the processor of a dense vision-language model, for `VLMoEProcessor.from_dense`.

- Llava: image tokens without markers, one tile per image.
- Idefics3 and SmolVLM: a marker before each tile, rows and columns, the whole image last.
- InternVL: the tokens of all tiles between two markers, the whole image last.

The source's own class is not built: InternVL's and SmolVLM's ask for packages that their videos
need. The same parts are read here: tokenizer, chat template, image processor, settings.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from PIL import Image
from transformers import (
    AddedToken,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..configuration.tower_facts import tower_image_size
from ..data.videos import FRAME_TEXTS
from ..processing.image_layout import encode_images, tiling_option
from ..processing.processing_vlmoe import VLMoEProcessor

NO_BOUND = 2**31 - 1
Source: TypeAlias = (
    ProcessorMixin | tuple[BaseImageProcessor, PreTrainedTokenizerBase] | str | os.PathLike[str]
)
"""A dense model's processor, a pair of its parts, a folder or a Hub id."""
FAMILIES = ("Idefics3Processor", "InternVLProcessor", "LlavaProcessor", "SmolVLMProcessor")

_ANYRES = "it packs the tiles of an image into one grid without padding, a newline feature per row"
_OWN_SIZE = "it takes images at their own size, for positions on three axes (M-RoPE)"
REFUSED = {
    **dict.fromkeys(("LlavaNextProcessor", "LlavaNextVideoProcessor"), _ANYRES),
    "LlavaOnevisionProcessor": _ANYRES,
    "PaliGemmaProcessor": "its model attends to image and prompt in both directions",
    "Gemma3Processor": "its model attends in both directions within an image",
    **dict.fromkeys(("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"), _OWN_SIZE),
    "PixtralProcessor": "it takes images of any size, with a break token after each row of patches",
}
"""Processors that cannot be converted exactly, and why."""


@dataclass(frozen=True)
class DenseProcessor:
    """The parts of a dense model's processor."""

    name: str  # of the class, one of FAMILIES
    image_processor: BaseImageProcessor
    tokenizer: PreTrainedTokenizerBase
    chat_template: str | dict[str, str] | None
    settings: Mapping[str, Any]  # of processor_config.json, or the processor's attributes


def read_dense_processor(source: Source, **kwargs: Any) -> DenseProcessor:
    """Read the processor of a dense model; see `VLMoEProcessor.from_dense`."""
    if isinstance(source, tuple | list):
        image_processor, tokenizer = source
        name = _family_of(image_processor)
        settings: Mapping[str, Any] = {}
        template = None
    elif isinstance(source, ProcessorMixin):
        image_processor, tokenizer = source.image_processor, source.tokenizer
        name, settings = type(source).__name__, vars(source)
        template = source.chat_template
    else:
        return _from_files(source, **kwargs)
    name = _known_family(name, "the processor")
    # copies: they are changed below, and the source stays in use
    parts = copy.deepcopy((image_processor, tokenizer))
    return _as_called(DenseProcessor(name, *parts, template, settings))


def _from_files(source: str | os.PathLike[str], **kwargs: Any) -> DenseProcessor:
    """Read a local folder or a repository of the Hub, in transformers' old or new set of files."""
    with _reading(source, "the processor's settings and chat template"):
        settings, _ = ProcessorMixin.get_processor_dict(source, **kwargs)
        named = settings.get("processor_class") or _class_named_elsewhere(source, **kwargs)
    name = _known_family(named, f"{source}")
    with _reading(source, "the image processor"):
        image_processor = AutoImageProcessor.from_pretrained(source, backend="pil", **kwargs)
    with _reading(source, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
    template = settings.get("chat_template")
    return _as_called(DenseProcessor(name, image_processor, tokenizer, template, settings))


def _class_named_elsewhere(source: str | os.PathLike[str], **kwargs: Any) -> str | None:
    """Find the processor's class without processor_config.json, in transformers' order."""
    image_processor, _ = ImageProcessingMixin.get_image_processor_dict(source, **kwargs)
    tokenizer = get_tokenizer_config(source, **kwargs)
    name = image_processor.get("processor_class") or tokenizer.get("processor_class")
    if name is None:
        config, _ = PreTrainedConfig.get_config_dict(source, **kwargs)
        name = PROCESSOR_MAPPING_NAMES.get(config.get("model_type", ""))
    return name


@contextmanager
def _reading(source: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn any error of a reader into a `ValueError` that names the source."""
    try:
        yield
    except Exception as error:  # readers raise almost anything on broken files
        raise ValueError(
            f"{source}: {what} cannot be read ({type(error).__name__}: {error}). Needed: the files "
            "that `save_pretrained` of the dense model's processor writes."
        ) from error


def _family_of(image_processor: BaseImageProcessor) -> str:
    """Return the processor's class that a bare image processor belongs to."""
    kind = type(image_processor).__name__.partition("ImageProcessor")[0]
    name = "InternVLProcessor" if kind == "GotOcr2" else f"{kind}Processor"
    return name if name in FAMILIES or name in REFUSED else "LlavaProcessor"


def _known_family(name: str | None, where: str) -> str:
    """Return the name of a processor's class; refuse one whose layout cannot be kept."""
    if name in FAMILIES:
        return name
    reason = f" ({REFUSED[name]})" if name in REFUSED else ""
    what = f"a {name}" if name else "a processor that no file names"
    raise ValueError(
        f"{where}: {what} cannot be converted exactly{reason}; allowed: {', '.join(FAMILIES)}, or "
        "a pair (image_processor, tokenizer) of one of these."
    )


def _as_called(dense: DenseProcessor) -> DenseProcessor:
    """Prepare tokenizer and image processor as the source's class does at building and calls."""
    tokenizer, image_processor = dense.tokenizer, dense.image_processor
    if dense.name == "Idefics3Processor":
        tokens = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    elif dense.name == "InternVLProcessor":
        image_processor.crop_to_patches = True
        if "padding_side" not in tokenizer.init_kwargs:
            tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # else it would not be saved
    if tiling_option(image_processor) == "do_image_splitting" and not image_processor.do_resize:
        image_processor.size = {"longest_edge": NO_BOUND}  # unused by the source, a bound for us
    return dense


def layout_of(dense: DenseProcessor) -> dict[str, str]:
    """Return the source's layout of an image, as arguments of `VLMoEProcessor`.

    Raises:
        ValueError: an InternVL tokenizer does not name its image tokens.
    """
    tokenizer = dense.tokenizer
    if dense.name == "LlavaProcessor":
        token = dense.settings.get("image_token") or "<image>"
        return {"image_token": getattr(tokenizer, "image_token", token)}
    if dense.name == "InternVLProcessor":
        names = ("context_image_token", "start_image_token", "end_image_token")
        missing = [name for name in names if not hasattr(tokenizer, name)]
        if missing:
            raise ValueError(
                f"The tokenizer of an InternVL model has no {', '.join(missing)}; add them to "
                "`extra_special_tokens` of its tokenizer_config.json."
            )
        token, start, end = (getattr(tokenizer, name) for name in names)
        return {
            "image_token": token,
            "image_start_token": start,
            "image_end_token": end,
            "tile_layout": "internvl",
            "frame_text": FRAME_TEXTS[dense.name],
        }
    fake, token, whole = "<fake_token_around_image>", "<image>", "<global-img>"
    of_video = {}
    if dense.name == "SmolVLMProcessor":
        of_video = {"frame_text": FRAME_TEXTS[dense.name]}
        fake = getattr(tokenizer, "fake_image_token", fake)
        token = getattr(tokenizer, "image_token", token)
        whole = getattr(tokenizer, "global_image_token", whole)
    return {
        "image_token": token,
        "image_start_token": fake,
        "image_end_token": fake,
        "global_image_token": whole,
        "tile_layout": "idefics3",
        **of_video,
    }


def check_tiles(dense: DenseProcessor, config: VLMoEConfig, image_seq_len: int) -> None:
    """Check that the source makes the tiles that the vision tower takes.

    Raises:
        ValueError: another number of image tokens per tile, or tiles of another size.
    """
    stated = _stated_seq_len(dense, config)
    if stated is not None and stated != image_seq_len:
        raise ValueError(
            f"The {dense.name} states {stated} image tokens per tile, but the vision tower and "
            f"connector give {image_seq_len} features; correct its processor_config.json."
        )
    height, width = tower_image_size(config.vision_config)
    options = {"do_image_splitting": False} if tiling_option(dense.image_processor) else {}
    for size in ((2 * width, height), (width, 2 * height)):  # wide and tall
        probe = encode_images(dense.image_processor, [Image.new("RGB", size)], options)
        made = tuple(probe[0].pixel_values.shape[-2:])
        if made != (height, width):
            raise ValueError(
                f"The image processor makes {made[0]}x{made[1]} pixels of an image of "
                f"{size[1]}x{size[0]}, but the vision tower takes {height}x{width}; correct the "
                "sizes in its JSON file (`size`, `crop_size`, `max_image_size`)."
            )


def _stated_seq_len(dense: DenseProcessor, config: VLMoEConfig) -> int | None:
    """Return the image tokens of one tile by the source's settings, if they hold it."""
    settings = dense.settings
    if dense.name != "LlavaProcessor":
        name = "image_seq_length" if dense.name == "InternVLProcessor" else "image_seq_len"
        return settings.get(name)
    patch, additional = settings.get("patch_size"), settings.get("num_additional_image_tokens")
    if patch is None or additional is None:  # left out by older Llava models
        return None
    height, width = tower_image_size(config.vision_config)
    dropped = settings.get("vision_feature_select_strategy") == "default"
    return (height // patch) * (width // patch) + additional - dropped


def add_image_token(tokenizer: PreTrainedTokenizerBase, image_token: str = "<image>") -> int:
    """Return the id of a tokenizer's image token; add it as a special token if it is missing.

    For a language model that never saw images: its embeddings need at least `len(tokenizer)` rows
    afterwards, and `VLMoEConfig.image_token_id` is the id that is returned.
    """
    pair = tokenizer(image_token * 2, add_special_tokens=False)["input_ids"]
    if pair != [tokenizer.convert_tokens_to_ids(image_token)] * 2:
        tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)])
    return tokenizer.convert_tokens_to_ids(image_token)


def processor_from_dense(
    cls: type[VLMoEProcessor], source: Any, config: VLMoEConfig, **kwargs: Any
) -> VLMoEProcessor:
    """Make the processor for a converted dense vision-language model.

    `VLMoEProcessor.from_dense` calls it with its class.

    Text and pixels are the source's, token for token and pixel for pixel (by PIL). A source
    without a chat template gets `DEFAULT_CHAT_TEMPLATE`.

    Args:
        cls: the processor's class.
        source: a local folder or Hub id of a Llava, InternVL, SmolVLM or Idefics3 model; its
            processor; or a pair `(image_processor, tokenizer)`.
        config: the converted model's `VLMoEConfig`.
        **kwargs: of `from_pretrained`, such as `revision` or `token`, for a folder or Hub id.

    Raises:
        ValueError: a file is missing or broken, the processor is of another kind, or its image
            token, number of image tokens or image size does not fit `config`.
    """
    dense = read_dense_processor(source, **kwargs)
    parts = config, dense.tokenizer, dense.image_processor
    layout: dict[str, Any] = {"chat_template": dense.chat_template, **layout_of(dense)}
    processor = cls.for_config(*parts, **layout)
    check_tiles(dense, config, processor.image_seq_len)
    return processor
