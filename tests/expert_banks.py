"""Banks of all layouts that transformers' experts interface knows.

Hidden, inner and experts all differ.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

EXPERTS, HIDDEN, INNER = 5, 8, 12  # in fp32 such rows are multiples of 16 bytes, in bf16 not
ODD = (EXPERTS, 6, 7)
EVEN = (EXPERTS, 8, 16)
LAYOUTS: dict[str, dict[str, bool]] = {
    "gated": {},
    "no gate, biases": {"has_gate": False, "has_bias": True},
    "transposed, biases": {"is_transposed": True, "has_bias": True},
    "norm of each expert": {"has_post_expert_norm": True},
}


def make_bank(
    layout: str = "gated",
    sizes: tuple[int, int, int] = (EXPERTS, HIDDEN, INNER),
    dtype: torch.dtype = torch.float32,
    implementation: str = "auto",
) -> Any:
    """A bank of that layout with random parameters."""
    experts, hidden, inner = sizes
    flags = {"has_gate": True, "has_bias": False, "is_transposed": False} | LAYOUTS[layout]
    first, wide = ("gate_up_proj", 2 * inner) if flags["has_gate"] else ("up_proj", inner)

    @use_experts_implementation(**LAYOUTS[layout])
    class Bank(nn.Module):
        def __init__(self, config: Any):
            super().__init__()
            self.num_experts, self.act_fn = experts, nn.SiLU()
            self.post_expert_norm = nn.RMSNorm(hidden)
            for name, out, width in ((first, wide, hidden), ("down_proj", hidden, inner)):
                shape = (experts, width, out) if flags["is_transposed"] else (experts, out, width)
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
                if flags["has_bias"]:
                    bias = nn.Parameter(torch.empty(experts, out))
                    self.register_parameter(f"{name}_bias", bias)

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            raise AssertionError("`eager` ran")

    torch.manual_seed(0)
    bank = Bank(SimpleNamespace(_experts_implementation=implementation, hidden_act="silu"))
    for parameter in bank.parameters():
        nn.init.normal_(parameter, std=0.5)
    return bank.to(dtype)
