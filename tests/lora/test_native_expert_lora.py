"""LoRA on the experts of transformers' own sparse families: the routed path against PEFT's."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from sparse_families import (
    EXPERTS,
    FAMILIES,
    SPARSE_TEXTS,
    TOP_K,
    VISIONS,
    FamilyCollator,
    row,
    sparse_family,
)
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from vlmoe import add_expert_lora, merge_expert_lora
from vlmoe.lora import disable_routed_lora, load_adapter
from vlmoe.routing.routed_layers import routed_layers

FAST = (
    "qwen3_5_moe",
    "glm4v_moe",
    "ernie4_5_vl_moe",
    "gemma4",
    "minimax_m3_vl",
    "llava_qwen3_moe",
)
EACH_FAMILY = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FAMILIES
]
Tensors = dict[str, torch.Tensor]


def batch_of(family: str) -> Tensors:
    """Rows of different lengths, two of them with images where the family has a vision tower."""
    sees = family in VISIONS or "_qwen3_moe" in family
    rows = [row(9, 5, seed=0, images=sees * 2), row(12, 7, seed=1), row(5, 2, 2, images=sees * 1)]
    batch = FamilyCollator(family)(rows)
    del batch["labels"]
    return batch


def with_adapter(model: PreTrainedModel) -> PeftModel:
    """Put an adapter with random A and B on the experts."""
    adapted = add_expert_lora(model.eval(), r=3)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return adapted


def logits_and_gradients(adapted: PeftModel, batch: Tensors) -> tuple[torch.Tensor, Tensors]:
    adapted.zero_grad()
    logits = adapted(**batch).logits
    logits.backward(torch.linspace(-1, 1, logits.numel()).view_as(logits))  # of every token
    gradients = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    return logits.detach(), {n: g.clone() for n, g in gradients.items() if g is not None}


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_the_routed_path_gives_pefts_logits_and_gradients(family: str, calls: list[type]) -> None:
    adapted = with_adapter(sparse_family(family))
    batch = batch_of(family)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    with torch.no_grad(), adapted.disable_adapter():
        base = adapted(**batch).logits
    routed, gradients = logits_and_gradients(adapted, batch)
    assert calls
    calls.clear()
    disable_routed_lora(adapted)
    peft, expected = logits_and_gradients(adapted, batch)
    assert not calls
    assert (peft - base).abs().max() > 0.1
    assert (routed - peft).abs().max() <= 1e-5 * peft.abs().max()
    assert gradients.keys() == expected.keys() == trained
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (gradients[name] - gradient).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_adapters_load_in_plain_peft_and_merge_into_plain_models(
    family: str, tmp_path: Path
) -> None:
    base, adapter, merged = (str(tmp_path / name) for name in ("base", "adapter", "merged"))
    sparse_family(family).save_pretrained(base)
    auto = AutoModelForCausalLM if family in SPARSE_TEXTS else AutoModelForImageTextToText
    adapted, batch = with_adapter(auto.from_pretrained(base)), batch_of(family)
    adapted.save_pretrained(adapter)
    with torch.no_grad():
        expected = adapted(**batch).logits
        loaded = PeftModel.from_pretrained(auto.from_pretrained(base), adapter).eval()
        by_peft = loaded(**batch).logits
        by_us = load_adapter(auto.from_pretrained(base), adapter).eval()(**batch).logits
        merge_expert_lora(adapted).save_pretrained(merged)
        whole = auto.from_pretrained(merged).eval()(**batch).logits
    torch.testing.assert_close(by_us, by_peft, rtol=0, atol=0)
    for logits in (by_peft, whole):
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["gemma4", "ernie4_5_vl_moe", "llava_qwen3_moe"])
def test_routers_and_connectors_are_found_and_ranks_follow_the_active_experts(family: str) -> None:
    model = sparse_family(family)
    config = model.config.get_text_config()
    if family == "gemma4":
        del config.num_experts_per_tok  # the published configs have `top_k_experts` alone
    adapted = add_expert_lora(
        model, r=4, router=True, connector=True, rank_scaling="per_active_expert"
    )
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    routers = [name for name in names if ".router." in name or ".gate." in name]
    assert len(routers) == len(routed_layers(model))
    assert any("experts" not in name and name not in routers for name in names)
    sizes = {p.shape[0] for n, p in adapted.named_parameters() if n in names and ".experts." in n}
    assert sizes == {EXPERTS * 4 // TOP_K}
