# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Write the tables of native pairs into docs/concepts/native.md, from the code's.

python docs/native_tables.py
"""

import re
from collections.abc import Sequence
from pathlib import Path

from vlmoe.upcycling.native_pairs import CONTAINERS, REFUSED, TEXT_PAIRS, WHOLE_PAIRS, Pair

PAGE = Path(__file__).parent / "concepts" / "native.md"
BLOCK = re.compile(r"(<!-- (\w+), from native_tables.py -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(page: str) -> str:
    """Return the page with the tables of today."""
    tables = {"pairs": pairs_table(), "models": models_table(), "refused": refused_table()}
    return BLOCK.sub(lambda found: f"{found[1]}{tables[found[2]]}\n{found[3]}", page)


def pairs_table() -> str:
    """Return a row for each pair of text models."""
    rows = []
    for dense, pairs in TEXT_PAIRS.items():
        for pair in pairs:
            how = " (with `sparse_type`)" if pair is not pairs[0] else ""
            fields = {name: value for name, value in pair.fields.items() if value is not None}
            shown = ", ".join(f"`{name}={value}`" for name, value in fields.items())
            rows.append(
                (f"`{dense}`", f"`{pair.sparse}`{how}", _shared(pair), _layers(pair), shown)
            )
    head = ("dense text model", "sparse text model", "shared expert", "sparse layers", "fields set")
    return _table(head, rows)


def models_table() -> str:
    """Return a row for each vision-language model."""
    rows = [(f"`{dense}`", f"`{sparse}`") for dense, sparse in WHOLE_PAIRS.items()]
    rows += [(f"`{kind}`", "the same class, with the sparse text model") for kind in CONTAINERS]
    return _table(("dense model", "becomes"), rows)


def refused_table() -> str:
    """Return a row for each reason of a refusal."""
    reasons: dict[str, list[str]] = {}
    for kind, reason in REFUSED.items():
        reasons.setdefault(reason, []).append(f"`{kind}`")
    return _table(("model", "why"), [(", ".join(of), reason) for reason, of in reasons.items()])


def _shared(pair: Pair) -> str:
    if pair.silent_branch:
        return "the dense MLP stays"
    if pair.shared is None:
        return "none"
    return "always" if pair.shared.required else "optional"


def _layers(pair: Pair) -> str:
    if pair.sparse_layers is None:
        return "all"
    if pair.sparse_layers == "mlp_only_layers":
        return "any"
    return "a run" if isinstance(pair.sparse_layers, tuple) else "the last n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
