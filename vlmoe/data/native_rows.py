# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Find rows that a model of transformers cannot be trained on, before training.

Its own processor decides how many tokens an image has, so that a row is measured by processing it.
That is done for the first row, and for all of them where long ones are to be left out; others are
refused when they are collated.
"""

from transformers.utils import logging as transformers_logging

from .conversations import parse_messages, row_name
from .long_rows import ON_LONG_ROWS, UsableRows, selected
from .native_collator import NativeCollator
from .row_fields import Rows


def usable_native_rows(
    rows: Rows, collator: NativeCollator, on_long_rows: str = "error", *, progress: bool = True
) -> UsableRows:
    """Check that rows are well-formed, have something to learn, and, for "drop", are not too long.

    Args:
        rows: as `load_rows` gives them.
        collator: will collate them.
        on_long_rows: "error" and "shorten-prompt" leave longer rows to the collator, which refuses
            or shortens them; "drop" leaves them out, with all their conversations.
        progress: show a progress bar where every row is processed.

    Raises:
        ValueError: `on_long_rows` is unknown; a row is malformed or has no answer (the message
            names it); no row is left.
    """
    if on_long_rows not in ON_LONG_ROWS:
        raise ValueError(f"on_long_rows is {on_long_rows!r}; allowed: {', '.join(ON_LONG_ROWS)}.")
    for position, row in enumerate(rows):
        name = row_name(row, position)
        for conversation in parse_messages(row, name):
            if not any(t.role == "assistant" and t.text().strip() for t in conversation):
                raise ValueError(f"{name}: no token to learn; it needs an assistant turn.")
    kept = list(range(len(rows)))
    limit = collator.max_length
    if on_long_rows == "drop" and limit is not None:
        bar = transformers_logging.tqdm(
            rows, desc="measuring rows", unit="row", disable=not progress
        )
        kept = [i for i, row in enumerate(bar) if max(collator.lengths([row])) <= limit]
        if not kept:
            raise ValueError(
                f"all {len(rows)} rows have more than max_length={limit} tokens; none is left."
            )
    collator([rows[kept[0]]])
    dropped = len(rows) - len(kept)
    return UsableRows(selected(rows, kept) if dropped else rows, dropped=dropped)
