# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""PEFT's adapters on experts, computed by the routed path; needs peft.

PEFT wraps the bank once for each adapted parameter, one `ParamWrapper` in another, and all of its
operations work on these. `enable_routed_lora` changes the class of the outermost wrapper of each
bank to a subclass of the same name (PEFT finds wrappers by that name), which computes the whole
chain. Configuration, parameters, files and every operation stay PEFT's. The model's code does not
depend on it: a copy from the Hub runs PEFT's own path.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layers
from peft.tuners.lora import model as peft_lora
from peft.tuners.lora.model import _adapter_names_pre_forward_hook
from peft.utils.hotswap import hotswap_adapter
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.utils import logging

from ..modeling_vlmoe.experts_auto import is_torchao
from .config import IN_MEMORY, check_not_offloaded, expert_lora_config
from .int8 import check_quantized_bank, is_int8, let_trainer_train
from .routed import ExpertAdapter, routed_lora_forward

logger = logging.get_logger(__name__)

_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class ParamWrapper(peft_layers.ParamWrapper):
    """PEFT's wrapper of one parameter of a bank, the outermost of its bank, with a routed forward.

    Where the routed path does not fit it runs PEFT's own forward and logs the reason once.
    """

    expert_dropout = 0.0
    trained_experts: torch.Tensor | None = None  # (E, 1, 1), one for those that train

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Compute as the bank: (tokens, hidden), choice (tokens, k), weights (tokens, k) -> like x.

        `adapter_names`, one for each row of the batch, comes from PEFT's hooks, as for its linear
        layers.
        """
        chain = _chain(self)
        off = any(each.disable_adapters or each.merged for each in chain)
        reason = None if off else _why_not_routed(chain, args, kwargs)
        if off or reason is not None:
            if adapter_names is not None:
                kwargs["adapter_names"] = adapter_names
            if reason is not None:
                self._fall_back(reason)
            return super().forward(x, *args, **kwargs)
        bank, (choice, weights) = self.get_base_layer(), args
        dropout = self.expert_dropout if self.training else 0.0
        if adapter_names is None:
            adapters = _adapters(chain, self.active_adapters, self.trained_experts)
            return routed_lora_forward(bank, x, choice, weights, adapters, dropout)
        own = [n for n in dict.fromkeys(adapter_names) if any(n in c.lora_A for c in chain)]
        if not own:
            return bank(x, choice, weights)
        of_token = _adapter_of_token(adapter_names, own, x)
        adapters = _adapters(chain, own, keep_places=True)
        return routed_lora_forward(bank, x, choice, weights, adapters, dropout, of_token)

    def _fall_back(self, reason: str) -> None:
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                raise ValueError(f"{name} has no data: it is on the meta device. {IN_MEMORY}")
        if _is_quantized(self):
            raise ValueError(
                "LoRA on quantized experts needs the routed path, which cannot run here: "
                f"{reason}. Change that, or load the model without `quantization_config`."
            )
        if self.training and (self.expert_dropout or self.trained_experts is not None):
            raise ValueError(
                "`dropout` and `train_experts` need the routed path, which cannot run here: "
                f"{reason}."
            )
        logger.warning_once(f"LoRA on experts is computed by PEFT's own path: {reason}.")


class LoraModel(peft_lora.LoraModel):
    """PEFT's model of a model with quantized experts; it refuses to merge before it starts."""

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        raise ValueError(
            "LoRA cannot be merged into quantized experts. Save the adapter, load the base model "
            "without `quantization_config`, and merge there."
        )


def enable_routed_lora(
    model: nn.Module,
    *,
    dropout: float = 0.0,
    train_experts: Mapping[int, Sequence[int]] | None = None,
) -> None:
    """Compute the LoRA of the model's experts by the routed path, in place; idempotent.

    Call it on a model that has its adapters: after `get_peft_model`, `PeftModel.from_pretrained` or
    `model.add_adapter`. An adapter that is added later to the same parameters is routed too. With
    `model(..., adapter_names=[...])`, as in PEFT, each row of a batch has its own adapter.

    The options apply to this run and are not saved; PEFT can load the trained adapter.

    Experts may be int8 (`vlmoe.expert_int8_config`); they are dequantized one at a time. Operations
    that need plain weights then raise: merging, and any fallback to PEFT's own path.

    Args:
        model: changed in place; each call sets all options.
        dropout: probability of dropping elements of the adapters' inputs in training.
        train_experts: by number of the layer, the experts whose adapters train; those of other
            layers do not. B must be zero for the others, and stays zero. None: all train.

    Raises:
        ValueError: no expert is adapted, a bank's layout does not fit, its weights are offloaded or
            quantized in another way, or an option is wrong; nothing is changed then.
    """
    outermost = _outermost_wrappers(model)
    if not outermost:
        raise ValueError(
            "`model` has no LoRA on experts. Inject it first: "
            "`peft.get_peft_model(model, vlmoe.expert_lora_config(model))`."
        )
    for name, wrapper in outermost.items():
        _check_layout(name, wrapper)
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` is {dropout}; allowed: at least 0 and below 1.")
    trained = _trained_experts(outermost, train_experts)
    for name, wrapper in outermost.items():
        wrapper.__class__ = ParamWrapper
        wrapper.expert_dropout = float(dropout)
        wrapper.trained_experts = trained[name]
    if any(map(_is_quantized, outermost.values())):
        let_trainer_train(model)
        for module in model.modules():
            if type(module) is peft_lora.LoraModel:
                module.__class__ = LoraModel


def disable_routed_lora(model: nn.Module) -> None:
    """Return the experts' LoRA to PEFT's own path, in place; idempotent.

    Raises:
        ValueError: the experts are quantized, which PEFT's own path cannot compute.
    """
    routed = {n: m for n, m in model.named_modules() if isinstance(m, ParamWrapper)}
    for name, wrapper in routed.items():
        if _is_quantized(wrapper):
            raise ValueError(
                f"{name}: the experts are quantized, which PEFT's own path cannot compute; leave "
                "the model routed, or load it without `quantization_config`."
            )
    for wrapper in routed.values():
        wrapper.__class__ = peft_layers.ParamWrapper
        del wrapper.expert_dropout, wrapper.trained_experts


def hotswap_expert_lora(
    model: nn.Module, folder: str, adapter_name: str = "default", **kwargs: Any
) -> None:
    """Check experts' adapters, then call `peft.utils.hotswap.hotswap_adapter`.

    PEFT accepts an adapter of another rank, too, and copies a smaller A over the first rows of the
    larger. That is right for a linear layer, but here these rows belong to other experts.

    Args:
        model: a PEFT model with adapters on experts, routed or not.
        folder: of the adapter to swap in, or its id on the Hub.
        adapter_name: the adapter of `model` that it takes the place of.
        kwargs: those of PEFT's function.

    Raises:
        ValueError: rank or number of experts differs, or the adapter's file is damaged; nothing is
            changed then.
    """
    wrappers = {n: m for n, m in model.named_modules() if isinstance(m, peft_layers.ParamWrapper)}
    owners = {name.removeprefix("_orig_mod.") for name in wrappers}
    current = {key.removeprefix("_orig_mod."): t for key, t in model.state_dict().items()}
    from_hub = {k: v for k, v in kwargs.items() if k in ("revision", "subfolder", "token")}
    try:
        weights = load_peft_weights(folder, device="cpu", **from_hub)
    except SafetensorError as error:
        raise ValueError(f"The adapter in {folder} is damaged: {error}.") from error
    for key, new in weights.items():
        module, _, matrix = key.removesuffix(".weight").rpartition(".")
        old = current.get(f"{module}.{matrix}.{adapter_name}.weight")
        if module in owners and old is not None and old.shape != new.shape:
            raise ValueError(
                f"{key} of {folder} has shape {tuple(new.shape)}, the model's {tuple(old.shape)}. "
                "Experts' adapters can be swapped at equal rank and number of experts; load this "
                "one by `load_adapter` under another name."
            )
    hotswap_adapter(model, folder, adapter_name, **kwargs)


def _chain(outermost: nn.Module) -> list[peft_layers.ParamWrapper]:
    """Return the wrappers of one bank, from outside in."""
    chain, module = [], outermost
    while isinstance(module, peft_layers.ParamWrapper):
        chain.append(module)
        module = module.base_layer
    return chain


def _is_quantized(wrapper: peft_layers.ParamWrapper) -> bool:
    return any(map(is_torchao, wrapper.get_base_layer().parameters()))


def _outermost_wrappers(model: nn.Module) -> dict[str, peft_layers.ParamWrapper]:
    """Return, by name, the outermost wrapper of each bank with an adapted 3-D parameter."""
    wrappers = {n: m for n, m in model.named_modules() if isinstance(m, peft_layers.ParamWrapper)}
    inner = {id(wrapper.base_layer) for wrapper in wrappers.values()}
    return {
        name: wrapper
        for name, wrapper in wrappers.items()
        if id(wrapper) not in inner and any(each._param_ndim == 3 for each in _chain(wrapper))
    }


def _check_layout(name: str, wrapper: peft_layers.ParamWrapper) -> None:
    bank = wrapper.get_base_layer()
    names = [each.parameter_name for each in _chain(wrapper)]
    known = all(hasattr(bank, a) for a in ("has_gate", "has_bias", "is_transposed", "num_experts"))
    if not known or bank.has_post_expert_norm or not hasattr(bank, "down_proj"):
        raise ValueError(
            f"{name}: {type(bank).__name__} is no bank of experts under transformers' "
            "`@use_experts_implementation` with `gate_up_proj` (or `up_proj`) and `down_proj`; "
            "leave its adapters to PEFT's own path."
        )
    if not set(names) <= set(_PROJECTIONS):
        raise ValueError(
            f"{name}: {type(bank).__name__} has adapters on {names}; allowed: {_PROJECTIONS}. "
            "Remove the others from `target_parameters`."
        )
    check_not_offloaded(name, bank)
    check_quantized_bank(name, bank)


def _adapter_of_token(names: Sequence[str], own: list[str], x: torch.Tensor) -> torch.Tensor:
    """Return (tokens,), the index of each token's adapter in `own`; `len(own)` for others."""
    if len(x) % len(names):
        raise ValueError(
            f"`adapter_names` has {len(names)} names, which do not divide the {len(x)} tokens of "
            "the batch; give one name for each row."
        )
    places = [own.index(name) if name in own else len(own) for name in names]
    return torch.tensor(places, device=x.device).repeat_interleave(len(x) // len(names))


def _adapters(
    chain: list[peft_layers.ParamWrapper],
    names: Sequence[str],
    trained: torch.Tensor | None = None,
    keep_places: bool = False,
) -> dict[str, list[ExpertAdapter | None]]:
    """Return, by parameter, the adapters of these names; with `keep_places` None for missing."""
    adapters: dict[str, list[ExpertAdapter | None]] = {}
    for wrapper in chain:
        each = [_adapter(wrapper, n, trained) if n in wrapper.lora_A else None for n in names]
        if any(each):
            adapters[wrapper.parameter_name] = each if keep_places else [a for a in each if a]
    return adapters


def _trained_experts(
    outermost: Mapping[str, peft_layers.ParamWrapper],
    train_experts: Mapping[int, Sequence[int]] | None,
) -> dict[str, torch.Tensor | None]:
    """Return, by name of the wrapper, its `trained_experts`."""
    if train_experts is None:
        return dict.fromkeys(outermost)
    found = {name: re.findall(r"\.layers\.(\d+)\.", f".{name}.") for name in outermost}
    if nameless := [name for name, numbers in found.items() if not numbers]:
        raise ValueError(f"`train_experts` needs numbered layers; {nameless[0]} is in none.")
    layers = {name: int(numbers[-1]) for name, numbers in found.items()}
    if unknown := sorted(train_experts.keys() - set(layers.values())):
        raise ValueError(
            f"`train_experts` names layers {unknown}; layers with adapted experts are "
            f"{sorted(layers.values())}."
        )
    trained: dict[str, torch.Tensor | None] = {}
    for name, wrapper in outermost.items():
        ids, count = list(train_experts.get(layers[name], [])), wrapper.num_experts
        if wrong := [i for i in ids if not 0 <= i < count]:
            raise ValueError(
                f"`train_experts`[{layers[name]}] has {wrong}; the layer's experts are 0 to "
                f"{count - 1}."
            )
        trained[name] = mask = torch.zeros(count, 1, 1)
        mask[ids] = 1.0
    for name, wrapper in outermost.items():
        _check_others_are_zero(name, wrapper, trained[name])
    return trained


def _check_others_are_zero(
    name: str, wrapper: peft_layers.ParamWrapper, trained: torch.Tensor | None
) -> None:
    for each in _chain(wrapper):
        for adapter, lora_b in each.lora_B.items():
            weight = lora_b.weight.detach().unflatten(1, (-1, wrapper.num_experts))
            if trained is not None and weight[..., (trained == 0).flatten()].any():
                raise ValueError(
                    f"`train_experts`: B of adapter {adapter!r} on {name} is not zero for all "
                    "other experts; start from a new adapter, or train those experts too."
                )


def _adapter(
    wrapper: peft_layers.ParamWrapper, name: str, trained: torch.Tensor | None
) -> ExpertAdapter:
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    expected = wrapper.r[name] * wrapper.num_experts
    if a.shape[0] != expected or b.shape[1] != expected:
        raise ValueError(
            f"Adapter {name!r} on {wrapper.parameter_name} has A {tuple(a.shape)} and B "
            f"{tuple(b.shape)}; rank {wrapper.r[name]} and {wrapper.num_experts} experts make "
            f"{expected} rows and columns. Load it again under another name."
        )
    scaling = wrapper.scaling[name]
    return ExpertAdapter(a, b, scaling if trained is None else scaling * trained.to(b.device))


def _foreign(hook: object) -> bool:
    """Tell whether a hook is not PEFT's, which passes `adapter_names` to each wrapper."""
    return getattr(hook, "func", None) is not _adapter_names_pre_forward_hook


def _why_not_routed(
    chain: list[peft_layers.ParamWrapper], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> str | None:
    """Return the reason why PEFT's forward must run, or None."""
    bank = chain[-1].base_layer
    if len(args) != 2 or kwargs:
        return f"{type(bank).__name__} is called with other arguments than tokens, choice, weights"
    for module in (*chain[1:], bank):  # those of the outermost run before and after its forward
        if any(_foreign(hook) for name in _HOOKS for hook in getattr(module, name).values()) or (
            hasattr(module, "_hf_hook")
        ):
            return f"{type(module).__name__} has hooks"
    if bank._is_expert_parallel:
        return "the experts are spread over ranks"
    if hasattr(bank, "parametrizations"):
        return f"{type(bank).__name__} has parametrizations"
    adapters = [p for each in chain for p in each.parameters(recurse=True)]
    for parameter in (*bank.parameters(), *adapters):
        if isinstance(parameter, DTensor) or parameter.is_meta:
            return "a parameter is a DTensor or has no data"
    for parameter in bank.parameters():
        if parameter.requires_grad:
            return "the base weights are trainable"
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            return f"the base weights have dtype {parameter.dtype}"
        if type(parameter.data) is not torch.Tensor and not is_int8(parameter):
            return f"the base weights are {type(parameter.data).__name__}"
    return None


__all__ = [
    "disable_routed_lora",
    "enable_routed_lora",
    "expert_lora_config",
    "hotswap_expert_lora",
]
