# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The ranges of numbers that training arguments take."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Finite numbers from `least` to `most`, above `above`, below `below`."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        """Return whether the number lies in the range."""
        inside = self.least <= value <= self.most and self.above < value < self.below
        return inside and math.isfinite(value)

    def __str__(self) -> str:
        """Return the range in words: `above 0 and at most 1`."""
        bounds = {
            "{:.10g} or more": self.least,
            "above {:.10g}": self.above,
            "at most {:.10g}": self.most,
            "below {:.10g}": self.below,
        }
        words = [text.format(bound) for text, bound in bounds.items() if math.isfinite(bound)]
        return " and ".join(words) or "finite"


COUNT = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(above=0)
SEED = Range(0, 2**32 - 1)

# By field of `TrainingArguments`.
RANGES = {
    **dict.fromkeys(("seed", "data_seed"), SEED),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), COUNT),
    **dict.fromkeys(("save_total_limit",), COUNT),
    **dict.fromkeys(("num_train_epochs", "learning_rate", "adam_epsilon"), POSITIVE),
    **dict.fromkeys(("logging_steps", "save_steps", "eval_steps"), POSITIVE),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps"), NOT_NEGATIVE),
    **dict.fromkeys(("dataloader_num_workers", "neftune_noise_alpha"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), Range(0, below=1)),
}


def require_in_range(name: str, value: object) -> None:
    """Refuse a number that lies outside of its argument's range.

    None passes, and so does an argument without a range.

    Raises:
        ValueError: names the argument, what is allowed, and what was given.
    """
    allowed = RANGES.get(name)
    if allowed is None or value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"`{name}` must be a number, got {value!r}.")
    if not allowed.holds(value):
        raise ValueError(f"`{name}` must be {allowed}, got {value}.")
