# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The processor of VLMoE: text with images in, `input_ids` and `pixel_values` out.

- Each image placeholder of the text expands to the tokens that image features replace.
- `pixel_values` is (batch, tiles, 3, H, W), one row per text, padded with zero tiles.
- Nothing is cut or dropped silently: an unusable image, a wrong number of images and a truncation
  that would cut an image are errors that name the sample.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self, TypeGuard

import numpy as np
from PIL import Image
from transformers import BatchEncoding, BatchFeature, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import (
    ImagesKwargs,
    MultiModalData,
    ProcessingKwargs,
    ProcessorMixin,
    Unpack,
)

from ..configuration.configuration_vlmoe import VLMoEConfig
from ..configuration.hub_code import HubCodeMixin, toolkit_module
from .chat_template import DEFAULT_CHAT_TEMPLATE
from .control_text import chat_markers, guarded_tokenizer
from .image_checks import load_rgb_image
from .image_layout import (
    Images,
    TiledImage,
    batch_tiles,
    encode_images,
    image_option,
    rows_of_images,
    tile_grid,
)
from .image_sources import DEFAULT_LIMITS, ImageLimits, ImageSource
from .text_checks import check_text_options, require_characters
from .video_frames import Frame, VideoReader, without_sampling

Texts = str | Sequence[str]
TILE_LAYOUTS = ("vlmoe", "idefics3", "internvl")
_BLANK = Image.new("L", (1, 1))


class VLMoEImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Image options of a call beyond the common ones, for image processors that tile.

    do_image_splitting: cut images larger than a tile into tiles plus a thumbnail.
    max_image_size: `{"longest_edge": ...}`, the side of a tile in pixels.
    """

    do_image_splitting: bool
    max_image_size: dict[str, int]


class VLMoEProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Options of a call."""

    images_kwargs: VLMoEImagesKwargs
    # transformers before 5.23 needs the attribute, and reads this option of a processor from it
    _defaults = (
        {}
        if hasattr(ProcessorMixin, "return_mm_token_type_ids")
        else {"text_kwargs": {"return_mm_token_type_ids": True}}
    )


class HubProcessorMixin(HubCodeMixin, ProcessorMixin):
    """A processor that saves its code; one class, as conformance tests look at the first base."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> list[str] | None:
        """Save as `HubCodeMixin` does; afterwards the processor equals a loaded one."""
        files = super().save_pretrained(*args, **kwargs)
        self.__dict__.pop("auto_map", None)  # loading drops it too
        return files


class VLMoEProcessor(HubProcessorMixin):
    """Join an image processor and a tokenizer.

    An image placeholder becomes `image_start_token`, `image_seq_len` image tokens, then
    `image_end_token`. A tiled image has between the two `<row_r_col_c>` and image tokens for each
    tile in reading order, a line break after each row, then a line break, `global_image_token` and
    the image tokens of the thumbnail: the order of `pixel_values`. In Idefics3's and SmolVLM's
    `tile_layout`, `image_start_token` precedes each tile's marker, and a single tile is marked as
    the whole image, too. InternVL's has the image tokens of all tiles, without markers or line
    breaks.

    `processor(images=..., text=..., padding=True, return_tensors="pt")` returns `input_ids`,
    `attention_mask`, `mm_token_type_ids` (batch, tokens; 0 text, 1 image token) and, if any row has
    an image, `pixel_values` (batch, tiles, 3, H, W) and `pixel_attention_mask` (batch, tiles, H, W;
    1 real, 0 padding). Images come as one list per text or as one flat list, each as any source of
    `load_rgb_image`. An image that several rows share (the same object or path) is encoded once,
    and no two are kept decoded at the same time. `do_image_splitting` switches tiling for the call.
    A call raises `ValueError`, naming the sample, for an unusable image, a number of images other
    than that of placeholders, and a truncation that would cut an image.

    Args:
        image_processor: Idefics3's, SmolVLM's or GotOcr2's (fixed size or tiles), or one that gives
            one (3, H, W) tensor per image, such as SigLIP's or CLIP's.
        tokenizer: any tokenizer in which `image_token` is one token.
        chat_template: by default the tokenizer's, else `DEFAULT_CHAT_TEMPLATE`.
        image_seq_len: image tokens of one tile; see `for_config`.
        image_token: the placeholder, and the token that the model replaces by features.
        image_start_token, image_end_token: text around each image.
        global_image_token: the marker before a thumbnail.
        tile_layout: `"vlmoe"`, `"idefics3"` or `"internvl"`.
        frame_text: the text before each frame of a video; see `VideoReader`.
        max_image_pixels, max_image_side: an image with more pixels, or a longer side, is refused
            before it is decoded. They are saved in processor_config.json.

    Raises:
        ValueError: `image_token` is not one token of the tokenizer, `image_seq_len` or a limit is
            below 1, or `tile_layout` is unknown.
    """

    hub_classes = {  # noqa: RUF012 - declared in HubCodeMixin
        "AutoProcessor": "processing.processing_vlmoe.VLMoEProcessor"
    }
    # During training Trainer pushes the processor's files, but not the model's code.
    hub_modules = ("modeling_vlmoe.modeling_vlmoe",)
    valid_processor_kwargs = VLMoEProcessorKwargs
    return_mm_token_type_ids = True
    unused_input_names = ("rows", "cols", "token_type_ids")  # outputs that the model does not take
    # The caller of a processor names the images; a copy that is called with data has False.
    opens_urls = True

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | dict[str, str] | None = None,
        image_seq_len: int = 196,
        image_token: str = "<image>",
        image_start_token: str = "",
        image_end_token: str = "",
        global_image_token: str = "<global-img>",
        tile_layout: str = "vlmoe",
        frame_text: str = "{time}: ",
        max_image_pixels: int = DEFAULT_LIMITS.max_pixels,
        max_image_side: int = DEFAULT_LIMITS.max_side,
    ) -> None:
        """Check the image token against the tokenizer and keep the layout."""
        if tile_layout not in TILE_LAYOUTS:
            raise ValueError(
                f"`tile_layout` is {tile_layout!r}; allowed: {', '.join(TILE_LAYOUTS)}."
            )
        if image_seq_len < 1:
            raise ValueError(f"`image_seq_len` is {image_seq_len}; allowed: 1 or more.")
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        pair = tokenizer(image_token * 2, add_special_tokens=False)["input_ids"]
        if pair != [self.image_token_id] * 2:
            raise ValueError(
                f"`image_token` {image_token!r} is not one token of the tokenizer; add it with "
                f"tokenizer.add_tokens([{image_token!r}], special_tokens=True) and resize the "
                "model's embeddings."
            )
        self.image_seq_len = image_seq_len
        self.image_token = image_token
        self.image_start_token = image_start_token
        self.image_end_token = image_end_token
        self.global_image_token = global_image_token
        self.tile_layout = tile_layout
        self.frame_text = frame_text
        self.max_image_pixels = ImageLimits(max_image_pixels, max_image_side).max_pixels
        self.max_image_side = max_image_side
        default = DEFAULT_CHAT_TEMPLATE.replace("<image>", image_token)
        chat_template = chat_template or getattr(tokenizer, "chat_template", None) or default
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def for_config(
        cls,
        config: VLMoEConfig,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor | None = None,
        **options: Any,
    ) -> Self:
        """Make a processor that fits a `VLMoEConfig`, such as one that tiles: `tiling=True`.

        For the arguments and errors see `vlmoe.data.tower_layout.processor_for_config`.
        """
        maker = toolkit_module("data.tower_layout", "A new processor")
        return maker.processor_for_config(cls, config, tokenizer, image_processor, **options)

    @classmethod
    def from_dense(
        cls,
        source: str | PathLike[str] | ProcessorMixin | tuple,
        config: VLMoEConfig,
        **kwargs: Any,
    ) -> Self:
        """Make the processor for a converted dense vision-language model.

        For the arguments and errors see `vlmoe.upcycling.dense_processor.processor_from_dense`.
        """
        converter = toolkit_module("upcycling.dense_processor", "Upcycling")
        return converter.processor_from_dense(cls, source, config, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of a call's tensors, those of text first: Trainer groups rows by the first."""
        names = [*self.tokenizer.model_input_names, *super().model_input_names]
        names += ["pixel_attention_mask", "mm_token_type_ids"]
        return [name for name in dict.fromkeys(names) if name not in self.unused_input_names]

    @property
    def image_limits(self) -> ImageLimits:
        """The largest image that is decoded."""
        return ImageLimits(self.max_image_pixels, self.max_image_side)

    @property
    def video_reader(self) -> VideoReader:
        """What makes frames of a chat's videos."""
        return VideoReader(self.frame_text, self.image_limits, self.opens_urls)

    def __call__(
        self,
        images: Images | None = None,
        text: Texts | None = None,
        **kwargs: Unpack[VLMoEProcessorKwargs],
    ) -> BatchFeature:
        """Images and text in, model inputs out; see the class."""
        check_text_options(kwargs)
        return super().__call__(images=images, text=text, **kwargs)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping | Sequence[Mapping]],
        chat_template: str | None = None,
        tools: list | None = None,
        documents: list[dict[str, str]] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | list[int] | list[list[int]] | BatchFeature:
        """Apply it as transformers does, but tokenize control strings of the caller as text.

        A user's `<|end|>` or `<image>` is encoded letter by letter: it neither ends a turn nor
        becomes an image, and decoding returns it. Control strings are special tokens and the
        markers of the default chat template, of images and of tiles. With `tokenize=False` they
        stay in the string, and a later tokenization makes control tokens of them.

        A part `{"type": "video", "video": path or frames}`, with `num_frames` or `fps` of its own
        or of the call, becomes its frames, each an image after a text such as "0.5 s: ".
        """
        kwargs, sampling = without_sampling(kwargs)
        conversation = self.video_reader.in_chats(conversation, sampling)
        values = {"conversation": conversation, "tools": tools, "documents": documents}
        guard = None
        own = self.chat_template
        named = own if isinstance(own, dict) else {"default": own}
        template = named.get(chat_template or "default", chat_template)  # or the text itself
        is_guarded = kwargs.get("tokenize") and not kwargs.get("sanitize_control_tokens")
        if is_guarded and template is not None:
            # a variable such as `image_token` is meant as a token
            options = {
                name: value
                for name, value in kwargs.items()
                if name != "processor_kwargs" and not name.endswith("_token")
            }
            markers = chat_markers(self)
            guard = guarded_tokenizer(self.tokenizer, [values, options], template, markers)
        if guard is None:
            return super().apply_chat_template(**values, chat_template=chat_template, **kwargs)
        guarded = copy.copy(self)
        guarded.tokenizer = guard
        values, options = guard.mark([values, options])
        try:
            return super(VLMoEProcessor, guarded).apply_chat_template(
                **values, chat_template=chat_template, **kwargs | options
            )
        except Exception as error:  # a template may refuse its input and quote it
            error.args = tuple(guard.unmark(a) if isinstance(a, str) else a for a in error.args)
            raise

    def prepare_inputs_layout(
        self,
        images: Images | None = None,
        text: Any = None,
        videos: object = None,
        audio: object = None,
        **kwargs: object,
    ) -> tuple[list[list[ImageSource]] | None, Any, None, None]:
        """Distribute the unopened images: `(images of each row, texts, None, None)`."""
        if videos is not None or audio is not None:
            raise ValueError(
                f"{type(self).__name__} takes images and text; give a video as a part of a chat to "
                "apply_chat_template, or its frames as images."
            )
        if isinstance(text, str | tuple):
            text = [text] if isinstance(text, str) else list(text)
        elif isinstance(text, list):
            text = text.copy()  # the expansion writes into it
        if _are_texts(text):
            if not text:
                raise ValueError("`text` is an empty list; give at least one text.")
            for sample, each in enumerate(text):
                require_characters(each, f"sample {sample}")
        if images is None:
            return None, text, None, None
        placeholders = [t.count(self.image_token) for t in text] if _are_texts(text) else None
        rows = rows_of_images(images, placeholders)
        if placeholders is not None and len(rows) != len(placeholders):
            raise ValueError(
                f"`images` has {len(rows)} rows but `text` has {len(text)}; the number of "
                f"{self.image_token} tokens in the prompts should be the same as the number of "
                "images, and each text should have its list of images."
            )
        return rows if any(rows) else None, text, None, None

    def validate_inputs(
        self,
        images: list[list[ImageSource]] | None = None,
        text: list[str] | None = None,
        **kwargs: object,
    ) -> None:
        """Check that each text has as many placeholders as images."""
        if _are_texts(text):
            for sample, row in enumerate(text):
                given = len(images[sample]) if images else 0
                placeholders = row.count(self.image_token)
                if placeholders != given:
                    raise ValueError(
                        f"sample {sample}: the text has {placeholders} {self.image_token} "
                        f"placeholders but {given} images are given; give one image per "
                        "placeholder. (A chat template that ignores image parts leaves none.)"
                    )
        # Blank images are counted: transformers would refuse some of the sources.
        counted = [[_BLANK] * len(row) for row in images] if images else None
        super().validate_inputs(images=counted, text=text, **kwargs)

    def replace_image_token(
        self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: object
    ) -> str:
        """Return the text that image `image_idx` of the whole batch expands to."""
        rows = [rows for row in image_inputs["rows"] for rows in row][image_idx]
        cols = [cols for row in image_inputs["cols"] for cols in row][image_idx]
        return self._image_text(rows, cols)

    def create_mm_token_type_ids(self, input_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return 1 for each image token, 0 for each other token."""
        return [(np.asarray(row) == self.image_token_id).astype(int).tolist() for row in input_ids]

    def _image_text(self, rows: int, cols: int) -> str:
        start, end = self.image_start_token, self.image_end_token
        tile = self.image_token * self.image_seq_len
        if self.tile_layout == "internvl":
            return f"{start}{tile * (rows * cols + 1)}{end}"
        marked = self.tile_layout == "idefics3"
        each, outer = (start, "") if marked else ("", start)
        grid = [
            [f"{each}<row_{r + 1}_col_{c + 1}>{tile}" for c in range(cols)] for r in range(rows)
        ]
        crops = "".join("".join(row) + "\n" for row in grid)
        whole = f"{each}{self.global_image_token}{tile}" if grid or marked else tile
        return f"{outer}{crops}\n{whole}{end}" if grid else f"{outer}{whole}{end}"

    def _process_images(
        self, images: list[list[ImageSource]], **kwargs: Any
    ) -> tuple[dict[str, Any], list[str]]:
        """Open and encode each distinct image, one at a time, then lay the tiles out by rows."""
        options: dict[str, Any] = {
            "keep_floats": image_option(self.image_processor, kwargs, "do_rescale") is False,
            "channels": kwargs.get("input_data_format"),
            "limits": self.image_limits,
            "allow_urls": self.opens_urls,
        }
        encoded: dict[str | Path | int, TiledImage] = {}
        for sample, row in enumerate(images):
            for position, source in enumerate(row):
                if _key(source) not in encoded:
                    where = f"sample {sample}, image {position}"
                    image, own = source, kwargs
                    if isinstance(source, Frame):
                        image, own = source.image, {**kwargs, "do_image_splitting": False}
                    opened = [load_rgb_image(image, where, **options)]
                    (encoded[_key(source)],) = encode_images(self.image_processor, opened, own)
                    opened.clear()  # before the next one is decoded
        batch = [[encoded[_key(source)] for source in row] for row in images]
        grids = {
            "rows": [[image.rows for image in row] for row in batch],
            "cols": [[image.cols for image in row] for row in batch],
        }
        count = sum(len(row) for row in batch)
        texts = [self.replace_image_token(grids, image_idx) for image_idx in range(count)]
        return {**batch_tiles(batch), **grids}, texts

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Count tokens and tiles of images by (height, width), for servers that plan ahead."""
        if image_sizes is None:
            return MultiModalData()
        own = VLMoEProcessorKwargs, self.tokenizer.init_kwargs
        options = self._merge_kwargs(*own, **kwargs)["images_kwargs"]
        grids = [tile_grid(h, w, self.image_processor, options) for h, w in image_sizes]
        lengths = {grid: self._count_tokens(self._image_text(*grid)) for grid in set(grids)}
        return MultiModalData(
            num_image_tokens=[lengths[grid] for grid in grids],
            num_image_patches=[rows * cols + 1 for rows, cols in grids],
        )

    def _count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _check_special_mm_tokens(
        self, text: list[str], text_inputs: BatchEncoding, modalities: list[str]
    ) -> None:
        """Refuse a truncation that cuts an image, its markers included."""
        for sample, expanded in enumerate(text):
            ids = text_inputs["input_ids"][sample : sample + 1]
            cause = None
            try:
                super()._check_special_mm_tokens([expanded], {"input_ids": ids}, modalities)
                if not self._cuts_a_marker(expanded, text_inputs, sample):
                    continue
            except ValueError as error:
                cause = error
            real = text_inputs.get("attention_mask", text_inputs["input_ids"])[sample]
            raise ValueError(
                f"sample {sample}: truncation to {np.count_nonzero(real)} tokens would cut an "
                f"image; the sample has {self._count_tokens(expanded)} tokens. Raise `max_length` "
                "or leave the sample out."
            ) from cause

    def _cuts_a_marker(self, text: str, text_inputs: BatchEncoding, sample: int) -> bool:
        """Return whether truncation kept all image tokens but lost a marker around them."""
        encodings = getattr(text_inputs, "encodings", None)
        if encodings is None or not encodings[sample].overflowing or self.image_token not in text:
            return False
        kept = [(start, end) for start, end in encodings[sample].offsets if end > start]
        end = self.image_token + self.image_end_token
        images = (self._image_text(1, 1), self._image_text(0, 0))
        starts = "|".join(re.escape(image.partition(self.image_token)[0]) for image in images)
        first_image = re.search(f"(?:{starts}){re.escape(self.image_token)}", text)
        return kept[-1][1] < text.rindex(end) + len(end) or (
            first_image is not None and kept[0][0] > first_image.start()
        )

    def _adjust_assistant_masks_indices(
        self, processed_dict: BatchFeature, generation_indices: list
    ) -> list:
        """Adjust them as transformers does, but on lists: its loop is far slower on tensors."""
        offsets = processed_dict["offset_mapping"]
        if hasattr(offsets, "tolist"):
            processed_dict["offset_mapping"] = offsets.tolist()
        return super()._adjust_assistant_masks_indices(processed_dict, generation_indices)


def _key(source: ImageSource) -> str | Path | int:
    """Return a key that is equal for the same object, path or string."""
    return source if isinstance(source, str | Path) else id(source)


def _are_texts(text: object) -> TypeGuard[list[str]]:
    return isinstance(text, list) and all(isinstance(sample, str) for sample in text)


__all__ = ["DEFAULT_CHAT_TEMPLATE", "VLMoEProcessor"]
