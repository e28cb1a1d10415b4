# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Preference pairs to batches, for TRL's DPOTrainer.

A row is `{"prompt": [...], "chosen": [...], "rejected": [...], "images": [...]}`: messages in the
form of `conversations.py`; the image parts stand in the prompt, and `images` is empty where there
are none.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .collator import TokenRow, VLMoECollator
from .conversations import REMOVED, parse_row


class VLMoEPreferenceCollator(VLMoECollator):
    """Rows -> `input_ids`, `attention_mask`, `mm_token_type_ids`, `completion_mask`, images.

    The token rows are those of prompt + chosen, then those of prompt + rejected, in the order of
    the dataset rows. `completion_mask` (2 * batch, length) is 1 on the tokens that the assistant
    generates after the prompt: its content and `<|end|>`. An image is encoded once for both.

    Arguments as in `RowCollator`. A row without any token of an answer is an error.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows; raises `ValueError` naming the row that is malformed or too long."""
        token_rows, starts, names = [], [], []
        for side in ("chosen", "rejected"):
            for position, row in enumerate(rows):
                token_row, start, name = self._encode(row, position, side)
                token_rows.append(token_row)
                starts.append(start)
                names.append(f"{name}, {side}")
        batch, mask = self._pad(token_rows, side="right")
        completion = mask & (torch.arange(mask.shape[1]) >= torch.tensor(starts)[:, None])
        for name, learns in zip(names, completion.any(-1).tolist(), strict=True):
            if not learns:
                raise ValueError(
                    f"{name}: no token of the answer to compare; it must have an assistant turn."
                )
        return {**batch, "completion_mask": completion.long(), **self._pixels(token_rows)}

    def _encode(
        self, row: Mapping[str, Any], position: int, side: str
    ) -> tuple[TokenRow, int, str]:
        """One side of a pair, the token at which its answer starts, and the name of the row."""
        prompt, answer = row.get("prompt"), row.get(side)
        if not (isinstance(prompt, list) and prompt and isinstance(answer, list) and answer):
            raise ValueError(
                f"row {position} of the batch: `prompt`, `chosen` and `rejected` must be lists of "
                f"messages, got the columns {sorted(row)}, `prompt` {prompt!r:.60} and `{side}` "
                f"{answer!r:.60}. {REMOVED}"
            )
        parsed = parse_row({**row, "messages": [*prompt, *answer]}, position)
        images = self._images(parsed.images, parsed.name)
        (conversation,) = parsed.conversations
        whole = self.encode_conversation(conversation, parsed.name)
        opening = self.encode_conversation(conversation[: len(prompt)], parsed.name)
        start = sum(map(len, opening.segments))
        start += sum(len(image.token_ids) for image in images[: len(opening.segments) - 1])
        return self._token_row(whole, images, parsed.name), start, parsed.name
