"""Experts that only image or only text tokens may use, and biases of the modalities."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.modeling_vlmoe.router import Routing, VLMoERouter
from vlmoe.modeling_vlmoe.router_losses import load_balancing_loss

TOKENS, HIDDEN = 400, 16
SEPARATE = {"text": [0, 2, 5], "image": [1, 3, 4]}  # as in VL-MoE
SHARED = {"text": [0, 1, 2], "image": [2, 3, 1, 5]}  # some of one, some of both, one of none
ROWS = ["..a...", "......", "b.a.."]
EVERY = {"text": [0, 1, 2, 3, 4, 5], "image": [5, 4, 3, 2, 1, 0]}
EXPERTS = {"num_experts": 6}


def make_router(experts: dict[str, list[int]], seed: int, **options: Any) -> VLMoERouter:
    """A seeded router of random size of logits, biases of both kinds."""
    torch.manual_seed(seed)
    routing = Routing(2, modality_experts=experts, **options)
    router = VLMoERouter(HIDDEN, 6, routing, has_selection_bias=True, has_modality_bias=True)
    scale = 10.0 ** torch.empty(()).uniform_(-1, 3).item()  # up to scores of exactly 0 and 1
    torch.nn.init.normal_(router.weight, std=scale)
    torch.nn.init.normal_(router.modality_bias, std=scale)
    torch.nn.init.normal_(router.e_score_correction_bias, std=scale)
    return router


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("experts", [SEPARATE, SHARED])
def test_a_token_never_reaches_a_forbidden_expert(
    experts: dict[str, list[int]], scoring_func: str, dtype: torch.dtype
) -> None:
    for seed in range(40):
        router = make_router(experts, seed, scoring_func=scoring_func).to(dtype)
        types = torch.randint(2, (TOKENS,))
        logits, weights, index = router(torch.randn(TOKENS, HIDDEN, dtype=dtype), types)
        assert weights.isfinite().all() and logits.isfinite().all()
        for token_type, name in enumerate(("text", "image")):
            of_type = types == token_type
            assert set(index[of_type].unique().tolist()) <= set(experts[name]), (seed, name)
            forbidden = [e for e in range(6) if e not in experts[name]]
            assert not logits[of_type].softmax(-1)[:, forbidden].any()
        unmarked = router(torch.randn(TOKENS, HIDDEN, dtype=dtype))[2]
        assert set(unmarked.unique().tolist()) <= set(experts["text"]), "without types all is text"


@pytest.fixture
def batch(
    tiny_config: Callable[..., Any], tiny_batch: Callable[..., dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Rows with an image, only text, two images; a loss on every text token."""
    inputs = tiny_batch(tiny_config(), ROWS)
    is_text = inputs["attention_mask"].bool() & (inputs["mm_token_type_ids"] == 0)
    return inputs | {"labels": inputs["input_ids"].where(is_text, -100)}


def routed(model: VLMoEForConditionalGeneration, **inputs: Any) -> torch.Tensor:
    """(layers, batch, length, k): the experts of each token of one forward pass."""
    chosen = []
    routers = [module for module in model.modules() if isinstance(module, VLMoERouter)]
    handles = [
        router.register_forward_hook(lambda router, args, output: chosen.append(output[2]))
        for router in routers
    ]
    with torch.no_grad():
        logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return torch.stack(chosen).view(len(chosen), *logits.shape[:2], -1)


@pytest.mark.parametrize("given", ["ids", "ids only", "embeddings and types", "embeddings", "all"])
def test_the_model_keeps_modalities_apart_however_they_are_told(
    given: str, batch: dict[str, torch.Tensor], tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(text=EXPERTS | {"modality_experts": SEPARATE})
    types = batch["mm_token_type_ids"]
    del batch["labels"]
    embedded: list[torch.Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: embedded.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    expected = model(**batch).logits
    handle.remove()
    if given == "all":  # embeddings of text and images; only the types tell them apart
        batch = {name: batch[name] for name in ("attention_mask", "mm_token_type_ids")}
        batch["inputs_embeds"] = embedded[0].detach()
    elif given == "ids only":
        del batch["mm_token_type_ids"]
    elif given != "ids":
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
        if given == "embeddings":
            del batch["mm_token_type_ids"]
    torch.testing.assert_close(model(**batch).logits, expected)
    chosen, real = routed(model, **batch), batch["attention_mask"].bool()
    assert set(chosen[:, real & (types == 1)].unique().tolist()) <= set(SEPARATE["image"])
    assert set(chosen[:, real & (types == 0)].unique().tolist()) <= set(SEPARATE["text"])


def test_masks_that_allow_all_change_nothing_bit_for_bit(
    batch: dict[str, torch.Tensor], tiny_model: Callable[..., Any]
) -> None:
    text = EXPERTS | {"router_aux_loss_coef": 1.0, "router_z_loss_coef": 1.0}
    masked = tiny_model(text=text | {"modality_experts": EVERY}).train()
    plain = tiny_model(text=text).train()
    outputs = [model(**batch, output_router_logits=True) for model in (masked, plain)]
    for output in outputs:
        output.loss.backward()
    ours, reference = outputs
    assert torch.equal(ours.loss, reference.loss) and torch.equal(ours.logits, reference.logits)
    assert all(map(torch.equal, ours.router_logits, reference.router_logits))
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in masked.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


@pytest.mark.parametrize("rows", [ROWS, ["......", "...."], ["a."]])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_every_batch_gives_every_parameter_a_gradient(
    checkpointing: bool | None,
    rows: list[str],
    tiny_model: Callable[..., Any],
    tiny_batch: Callable[..., dict[str, torch.Tensor]],
) -> None:
    text = EXPERTS | {"modality_experts": SEPARATE, "router_modality_bias": True}
    model = tiny_model(text=text).train()
    inputs = tiny_batch(model.config, rows)
    inputs["labels"] = inputs["input_ids"]
    model(**inputs).loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    idle = [e for e in range(6) if e not in SEPARATE["text"]]
    experts = model.model.language_model.layers[0].mlp.experts
    assert experts.gate_up_proj.grad[SEPARATE["text"]].any()
    assert experts.gate_up_proj.grad[idle].any() == any("a" in row for row in rows)
    if checkpointing is None:
        return
    model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    model.zero_grad()
    model(**inputs).loss.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


def test_modality_biases_start_without_effect_and_learn_each_from_its_tokens(
    batch: dict[str, torch.Tensor], tiny_model: Callable[..., Any]
) -> None:
    biased, plain = tiny_model(text={"router_modality_bias": True}), tiny_model()
    assert torch.equal(biased(**batch).logits, plain(**batch).logits)
    biased(**batch).loss.backward()
    bias = biased.model.language_model.layers[0].mlp.router.modality_bias
    assert bias.grad.shape == (2, 4) and bias.grad.any(-1).all()
    biased.zero_grad()
    text_only = {name: batch[name][1:2] for name in ("input_ids", "attention_mask", "labels")}
    biased(**text_only).loss.backward()
    assert bias.grad[0].any() and not bias.grad[1].any()
    with torch.no_grad():
        bias[1, 3] += 100.0
    chosen, types = routed(biased, **batch)[0], batch["mm_token_type_ids"] == 1
    assert (chosen[types] == 3).any(-1).all()
    assert torch.equal(chosen[~types], routed(plain, **batch)[0][~types])


def test_generated_tokens_are_text(
    tiny_model: Callable[..., Any], tiny_batch: Callable[..., dict[str, torch.Tensor]]
) -> None:
    text = EXPERTS | {"modality_experts": SEPARATE, "router_modality_bias": True}
    model = tiny_model(text=text)
    for module in model.modules():
        if isinstance(module, VLMoERouter):
            torch.nn.init.normal_(module.modality_bias)
    inputs = tiny_batch(model.config, ["a..", ".b"])
    new = model.generate(**inputs, max_new_tokens=5, do_sample=False, suppress_tokens=[5])[:, -5:]
    for _ in range(5):  # without a cache
        logits = model(**inputs, use_cache=False).logits[:, -1]
        logits[:, model.config.image_token_id] = float("-inf")
        token = logits.argmax(-1, keepdim=True)
        assert torch.equal(token, new[:, :1])
        new = new[:, 1:]
        for name, more in (
            ("input_ids", token),
            ("attention_mask", torch.ones_like(token)),
            ("mm_token_type_ids", torch.zeros_like(token)),
        ):
            inputs[name] = torch.cat([inputs[name], more], -1)


def test_the_mask_is_there_after_loading_and_not_in_the_file(
    tmp_path: Path, batch: dict[str, torch.Tensor], tiny_model: Callable[..., Any]
) -> None:
    text = EXPERTS | {"modality_experts": SEPARATE, "router_modality_bias": True}
    model = tiny_model(text=text)
    model.save_pretrained(tmp_path)
    loaded = VLMoEForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert not any("allowed_experts" in name for name in model.state_dict())
    assert any("modality_bias" in name for name in model.state_dict())
    assert loaded.config.text_config.modality_experts == SEPARATE


def test_separate_banks_are_balanced_each_by_itself() -> None:
    """A few text tokens collapse: pooled with many image tokens that would hardly show."""
    torch.manual_seed(0)
    is_image = torch.arange(60) >= 6
    logits = torch.full((60, 6), torch.finfo(torch.float32).min)
    for token in range(60):
        bank = SEPARATE["image" if is_image[token] else "text"]
        logits[token, bank] = torch.tensor([1.0, 1.0, 0.0]).roll(token)
    real, share = torch.ones(1, 60, dtype=torch.bool), torch.ones(1)
    banks = [(~is_image[None], 3), (is_image[None], 3)]
    balanced = load_balancing_loss((logits,), 2, real, share, banks=banks)
    assert balanced.item() == pytest.approx(2.0, rel=1e-5)
    logits[:6, SEPARATE["text"]] = torch.tensor([50.0, 50.0, -50.0])
    collapsed = load_balancing_loss((logits,), 2, real, share, banks=banks)
    assert collapsed.item() == pytest.approx(0.1 * 3.0 + 0.9 * 2.0, rel=1e-5)


def test_the_models_balance_loss_takes_its_banks_from_the_config(
    batch: dict[str, torch.Tensor], tiny_model: Callable[..., Any]
) -> None:
    text = EXPERTS | {"modality_experts": SHARED, "router_aux_loss_scope": "batch"}
    model = tiny_model(text=text)
    output = model(**batch, output_router_logits=True)
    real = batch["attention_mask"].bool().reshape(1, -1)
    is_image = (batch["mm_token_type_ids"] == 1).reshape(1, -1)
    expected = load_balancing_loss(
        output.router_logits, 2, real, torch.ones(1), banks=[(~is_image, 3), (is_image, 4)]
    )
    torch.testing.assert_close(output.aux_loss, expected)
