# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Find rows that do not fit the model, or that nothing can be learned from, before training.

The rows to use are chosen before the first step and from the rows alone, so every rank and every
resumed run uses the same, and no batch shrinks. Most rows are measured by their bytes, an upper
bound of their tokens: about 0.02 ms each. A row that this bound does not show to fit is rendered
and tokenized: 0.2 to 1 ms for 35 to 1,100 tokens. At most the header of an image is read, and only
if the processor cuts images into tiles.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..processing.image_layout import tiles_on
from ..processing.video_frames import Frame
from .collator import VLMoECollator
from .conversations import Conversation, Turn, count_images, parse_messages, row_name
from .images import image_size
from .row_fields import AnyRow, RowImage, Rows

logger = logging.getLogger(__name__)

ON_LONG_ROWS = ("error", "drop", "shorten-prompt")
SHORTEST = (Turn("user", ("a",)), Turn("assistant", ("a",)))


@dataclass(frozen=True)
class UsableRows:
    """The rows to use, and the number of those dropped, or shortened when collated.

    With `longest` the end of the longest text is cut, else the start of the oldest questions.
    """

    rows: Rows
    dropped: int = 0
    shortened: int = 0
    longest: bool = False

    def log(self, what: str, limit: int | None) -> None:
        """Log once how many rows were too long, and what happens to them."""
        count = self.dropped or self.shortened
        if count:
            cut = (
                "the end of their longest text" if self.longest else "the start of their questions"
            )
            done = "they are left out" if self.dropped else f"{cut} is cut off"
            logger.warning("%s rows with more than %s tokens: %s; %s.", what, limit, count, done)


def length_limit(config: PreTrainedConfig, max_length: int | None = None) -> int | None:
    """Return the longest sequence: `max_length`, by default the positions of a model's config.

    None if neither is given.

    Raises:
        ValueError: `max_length` is more than the model has positions.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length is not None and max_length > positions:
        raise ValueError(
            f"max_length={max_length} is more than the model has positions, "
            f"max_position_embeddings={positions}; lower it, or raise the config's field."
        )
    return positions if max_length is None else max_length


def prompt_limit(
    model: PreTrainedModel, new_tokens: int, max_length: int | None = None
) -> int | None:
    """Return the longest prompt: `max_length`, or the positions left by `new_tokens` if fewer.

    Raises:
        ValueError: no position is left.
    """
    limit, positions = length_limit(model.config, max_length), length_limit(model.config)
    if positions is None or limit is None:
        return limit
    if new_tokens >= positions:
        raise ValueError(
            f"an answer of {new_tokens} tokens leaves no room for a prompt in the model's "
            f"{positions} positions; lower max_new_tokens."
        )
    return min(limit, positions - new_tokens)


def require_room(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> None:
    """Raise `ValueError` for a question that does not fit the model with its answer."""
    limit = prompt_limit(model, new_tokens)
    if limit is not None and prompt_tokens > limit:
        raise ValueError(
            f"the question has {prompt_tokens} tokens, its images included; with an answer of "
            f"{new_tokens} tokens the model's {limit + new_tokens} positions hold {limit}. Shorten "
            "it, or lower max_new_tokens."
        )


def usable_rows(
    rows: Rows,
    collator: VLMoECollator,
    on_long_rows: str = "error",
    *,
    progress: bool = True,
) -> UsableRows:
    """Check that every row fits in `collator.max_length` tokens and has something to learn.

    Only the images of the first row are opened: it is collated as in training.

    Args:
        rows: as `load_rows` gives them.
        collator: will collate them; its cache keeps the texts that are tokenized here.
        on_long_rows: "error" refuses a longer row; "drop" leaves it out, with all its
            conversations; "shorten-prompt" counts it, for a collator that shortens prompts.
        progress: show a progress bar.

    Raises:
        ValueError: `on_long_rows` is unknown; a row is malformed, has no token with a loss, is too
            long, or stays so when shortened (the message names it); no row is left.
    """
    if on_long_rows not in ON_LONG_ROWS:
        raise ValueError(f"on_long_rows is {on_long_rows!r}; allowed: {', '.join(ON_LONG_ROWS)}.")
    measure = RowMeasure(collator)
    kept, long = [], 0
    bar = transformers_logging.tqdm(
        measure.light(rows), desc="measuring rows", unit="row", disable=not progress
    )
    for position, row in enumerate(bar):
        excess = measure(row, position, shorten=on_long_rows == "shorten-prompt")
        if excess and on_long_rows == "error":
            raise ValueError(f"{excess} {REMEDY}")
        long += excess is not None
        if excess is None or on_long_rows != "drop":
            kept.append(position)
    if not kept:
        raise ValueError(
            f"all {len(rows)} rows have more than max_length={collator.max_length} tokens; none is "
            "left."
        )
    collator([rows[kept[0]]])
    if on_long_rows != "drop":
        longest = collator.shorten_prompts == "longest"
        return UsableRows(rows, shortened=long, longest=longest)
    return UsableRows(selected(rows, kept) if long else rows, dropped=long)


def selected(rows: Rows, positions: list[int]) -> Rows:
    """Return the rows at these positions."""
    select: Callable[[list[int]], Rows] = getattr(rows, "select", lambda ps: [rows[p] for p in ps])
    return select(positions)


REMEDY = (
    "Raise max_length (up to the model's max_position_embeddings), or choose what happens to such "
    "rows with --on_long_rows drop or shorten-prompt."
)


class RowMeasure:
    """The length of rows against a collator's `max_length`."""

    def __init__(self, collator: VLMoECollator) -> None:
        self.collator = collator
        self.processor = collator.processor
        self.limit = collator.max_length
        self.tiles = tiles_on(self.processor.image_processor, {})
        self.template_length = collator.text_length(SHORTEST)
        (self.image_length,) = self.image_lengths([(64, 64)])
        (self.frame_length,) = self.image_lengths([(64, 64)], do_image_splitting=False)

    def light(self, rows: Rows) -> Rows:
        """Drop the rows' images if all images have the same number of tokens."""
        columns = getattr(rows, "column_names", ())
        return rows if self.tiles or "images" not in columns else rows.remove_columns("images")  # type: ignore[attr-defined]

    def image_lengths(self, sizes: list[tuple[int, int]], **options: bool) -> list[int]:
        """Return the number of tokens of images of the sizes (height, width)."""
        return self.processor._get_num_multimodal_tokens(sizes, **options)["num_image_tokens"]

    def lengths_of(
        self, images: Sequence[RowImage | Frame], sizes: list[tuple[int, int]]
    ) -> list[int]:
        """Return the number of tokens of a row's images and frames."""
        lengths = zip(images, self.image_lengths(sizes), strict=True)
        return [self.frame_length if isinstance(image, Frame) else each for image, each in lengths]

    def __call__(self, row: AnyRow, position: int, shorten: bool) -> str | None:
        """Return the error of a row that is too long, or None; raise others as `usable_rows`."""
        name = row_name(row, position)
        if self.tiles or row.get("videos"):
            parsed = self.collator.parsed(row, position)
            whole = sum(self._image_length(image, name) for image in parsed.images)
            pairs = [(each, whole) for each in parsed.conversations]
        else:
            conversations = parse_messages(row, name)
            pairs = [(each, count_images(each) * self.image_length) for each in conversations]
        excesses = [self._excess(each, images, name, shorten) for each, images in pairs]
        return next(filter(None, excesses), None)

    def _excess(
        self, conversation: Conversation, images: int, name: str, shorten: bool
    ) -> str | None:
        """Return the error of a conversation that is too long, or None."""
        texts = [turn.text() for turn in conversation]
        bound = images + sum(len(text.encode(errors="replace")) for text in texts)
        bound += self.template_length * len(conversation)
        answers = [turn for turn in conversation if turn.role == "assistant"]
        if any(turn.text().strip() for turn in answers) and (
            self.limit is None or bound <= self.limit
        ):
            return None
        encoded = self.collator.encode_conversation(conversation, name)
        if not any(mask.any() for mask in encoded.masks):
            raise ValueError(
                f"{name}: a conversation has no token with a loss: it has "
                f"{'only empty assistant turns' if answers else 'no assistant turn'}, so nothing "
                "can be learned from it. Give it an answer, or leave the row out."
            )
        length = images + sum(map(len, encoded.segments))
        if self.limit is None or length <= self.limit:
            return None
        if shorten:
            short = self.collator.shortened(conversation, self.limit - images)
            least = images + self.collator.text_length(short)
            if least > self.limit:
                is_longest = self.collator.shorten_prompts == "longest"
                text = "its user's longest text" if is_longest else "any text of its questions"
                raise ValueError(
                    f"{name}: without {text} a conversation has {least} tokens, "
                    f"more than max_length={self.limit}. Leave the row out, or raise max_length."
                )
        return f"{name}: a conversation has {length} tokens, more than max_length={self.limit}."

    def _image_length(self, image: RowImage | Frame, name: str) -> int:
        """Count an image's tokens; it is decoded only if its header cannot be read."""
        if isinstance(image, Frame):
            return self.frame_length
        encoder = self.collator.encode_image
        limits, allow_urls = encoder.processor.image_limits, encoder.allow_urls
        size = image_size(image, limits=limits, allow_urls=allow_urls)
        if size is None:
            return len(encoder(image, f"{name}, an image").token_ids)
        return self.image_lengths([(size[1], size[0])])[0]
