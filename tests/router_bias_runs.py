"""Rows of text, and plain training with a bias on the choice of experts."""

import torch

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.routing.balancing import update_router_bias
from vlmoe.routing.watch import watch_of

Inputs = dict[str, torch.Tensor]

LENGTHS = [9, 4, 7, 2, 8, 8, 3, 5]  # tokens of each row


def text_rows(lengths: list[int] = LENGTHS, side: str = "left") -> list[Inputs]:
    """Rows of random text tokens, padded on one side to the same length."""
    generator, rows = torch.Generator().manual_seed(0), []
    for length in lengths:
        tokens = torch.randint(6, 99, (length,), generator=generator)
        pad = (max(lengths) - length, 0) if side == "left" else (0, max(lengths) - length)
        row = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        row = {name: torch.nn.functional.pad(values, pad) for name, values in row.items()}
        row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
        rows.append(row)
    return rows


def batch(rows: list[Inputs]) -> Inputs:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def biases(model: torch.nn.Module) -> torch.Tensor:
    """(layers, experts)."""
    return torch.stack([b for n, b in model.named_buffers() if n.endswith("correction_bias")])


def loads_by_layer(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tokens of each expert since the last update, by the name of the block in the backbone."""
    watched = watch_of(model).loads
    assert watched is not None
    pairs = zip(watched.layers, watched.loads, strict=True)
    return {layer.name.removesuffix(".experts"): load for layer, load in pairs if load is not None}


def loads(model: torch.nn.Module) -> list[list[int]]:
    """The same in order, as lists."""
    return [load.tolist() for load in loads_by_layer(model).values()]


def plain_loop(model: VLMoEForConditionalGeneration, rows: list[Inputs], steps: int) -> None:
    """One batch of all rows in every step."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    for _ in range(steps):
        model(**batch(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_router_bias(model)
