# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Router losses of the vision tower and the connector.

They route within a tile, the decoder within a row. We apply the decoder's losses per tile and split
each row's weight evenly among its tiles; an image that several rows show counts once for each of
them. Rows without images add nothing.

Shapes: batch, length; tiles, as they were encoded; shown, the tiles of all rows one after another.
"""

import torch

from ..configuration.configuration_vlmoe import VLMoEConfig
from .router import Routing
from .router_losses import RouterLosses, TokenGroups, losses_of_place


def shown_tiles(
    tiles: int,
    tokens_per_tile: int,
    image_tokens: torch.Tensor,
    image_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return (2, shown): the number of each tile shown, and the row that shows it; row -1 is none.

    Args:
        tiles: how many were encoded.
        tokens_per_tile: image tokens of one tile.
        image_tokens: (batch, length), True for image tokens.
        image_index: (batch, tiles of a row), -1 for none; by default the rows show the encoded
            tiles in order, and the tiles left over are padding.
    """
    device = image_tokens.device
    if image_index is not None:
        index = image_index.to(device)
        rows = torch.arange(index.shape[0], device=device)[:, None].expand_as(index)
        shown = torch.stack([index.clamp(min=0), torch.where(index >= 0, rows, -1)])
        return shown.flatten(1)
    ends = image_tokens.sum(-1).cumsum(0)  # (batch,): image tokens of the rows so far
    tile = torch.arange(tiles, device=device)
    row = torch.searchsorted(ends, tile * tokens_per_tile, right=True)
    return torch.stack([tile, torch.where(row < ends.shape[0], row, -1)])


def vision_router_losses(
    config: VLMoEConfig,
    router_logits: tuple[torch.Tensor, ...],
    shown: torch.Tensor,
    row_weights: torch.Tensor,
    training: bool = False,
) -> list[RouterLosses]:
    """Compute load balancing loss and z-loss of tower and connector, of each that has experts.

    The mean over the tower's layers and the connector's losses are kept apart, to be added to the
    decoder's, so that no place dilutes another's balance.

    Args:
        config: of the whole model.
        router_logits: (tiles, patches, experts) for each sparse layer of the tower, then
            (tiles, image tokens, experts) for the connector if it has experts.
        shown: (2, shown), see `shown_tiles`.
        row_weights, training: as in router_losses.py.
    """
    row, row_weights = shown[1], row_weights.to(shown.device)
    rows = torch.arange(row_weights.shape[0], device=row.device)
    tiles_of_row = (row[:, None] == rows).sum(0).clamp(min=1)  # (batch,)
    weights = (row_weights / tiles_of_row)[row.clamp(min=0)] * (row >= 0)  # (shown,)
    layers = len(router_logits) - bool(config.projector_num_experts)
    places = (
        (router_logits[:layers], config.vision_num_experts_per_tok),
        (router_logits[layers:], config.projector_num_experts_per_tok),
    )
    losses = []
    for logits, top_k in places:
        if not logits:
            continue
        (tile, row), of_tiles = shown.to(logits[0].device), weights.to(logits[0].device)
        logits_shown = tuple(
            each.index_select(0, tile.to(each.device)).flatten(0, 1) for each in logits
        )
        real = (row >= 0)[:, None].expand(-1, logits[0].shape[1])  # (shown, patches)
        tiles = TokenGroups(real, real, of_tiles)
        place = logits_shown, tiles, training, Routing(top_k)
        losses.append(losses_of_place(config.text_config, *place))
    return losses
