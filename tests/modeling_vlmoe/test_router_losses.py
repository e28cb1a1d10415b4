"""Router losses against closed forms and a slow float64 reference, then inside the model.

The last part holds what users trip over elsewhere: one optimizer step gives the same gradient
however its rows are split.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.modeling_vlmoe import modeling_vlmoe
from vlmoe.modeling_vlmoe.router_losses import load_balancing_loss, router_z_loss

EXPERTS, TOP_K = 8, 2
BOTH_SCORES = pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
Logits = tuple[torch.Tensor, ...]


def balance_reference(
    router_logits: Logits,
    top_k: int,
    mask: torch.Tensor,
    row_weights: torch.Tensor,
    scoring_func: str,
) -> float:
    """Load balancing loss in plain Python floats."""
    layers = []
    for layer in router_logits:
        rows = layer.double().view(*mask.shape, -1).tolist()
        total = 0.0
        for tokens, real, weight in zip(rows, mask.tolist(), row_weights.tolist(), strict=True):
            experts, count = len(tokens[0]), max(sum(real), 1)
            sent, probability = [0.0] * experts, [0.0] * experts
            for token in (token for token, is_real in zip(tokens, real, strict=True) if is_real):
                if scoring_func == "softmax":
                    scores = [math.exp(z) for z in token]
                else:
                    scores = [1 / (1 + math.exp(-z)) for z in token]
                for e in sorted(range(experts), key=token.__getitem__)[-top_k:]:
                    sent[e] += 1 / count
                for e in range(experts):
                    probability[e] += scores[e] / sum(scores) / count
            total += weight * experts * sum(f * p for f, p in zip(sent, probability, strict=True))
        layers.append(total)
    return sum(layers) / len(layers)


def z_reference(router_logits: Logits, mask: torch.Tensor, row_weights: torch.Tensor) -> float:
    """Router z-loss in plain Python floats."""
    layers = []
    for layer in router_logits:
        rows = layer.double().view(*mask.shape, -1).tolist()
        total = 0.0
        for tokens, real, weight in zip(rows, mask.tolist(), row_weights.tolist(), strict=True):
            squares = [
                math.log(sum(math.exp(z) for z in token)) ** 2
                for token, is_real in zip(tokens, real, strict=True)
                if is_real
            ]
            total += weight * sum(squares) / max(len(squares), 1)
        layers.append(total)
    return sum(layers) / len(layers)


def all_real(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token mask and row weights of one row without padding."""
    return torch.ones(1, len(logits), dtype=torch.bool), torch.ones(1)


def balanced_logits() -> torch.Tensor:
    """(experts, experts): token t prefers experts t and t + 1, so that all get the same."""
    token = torch.tensor([1.0] * TOP_K + [0.0] * (EXPERTS - TOP_K))
    return torch.stack([token.roll(shift) for shift in range(EXPERTS)])


def collapsed_logits(first: int, top_k: int = TOP_K) -> torch.Tensor:
    """(experts, experts): all tokens go to the k experts from `first` on, 1 / k of each."""
    logits = torch.full((EXPERTS, EXPERTS), -50.0)
    logits[:, first : first + top_k] = 50.0
    return logits


def random_batch() -> tuple[Logits, torch.Tensor, torch.Tensor]:
    """Three layers, four rows of nine tokens: padding right, left, none, nothing but padding."""
    torch.manual_seed(0)
    logits = tuple(torch.randn(36, EXPERTS) * 2 for _ in range(3))
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[0, 6:] = mask[1, :4] = mask[3] = False
    return logits, mask, torch.tensor([0.5, 0.2, 0.3, 0.0])


@BOTH_SCORES
def test_perfect_balance_costs_k_and_collapse_costs_the_number_of_experts(
    scoring_func: str,
) -> None:
    for logits, expected in ((balanced_logits(), TOP_K), (collapsed_logits(3), EXPERTS)):
        loss = load_balancing_loss((logits,), TOP_K, *all_real(logits), scoring_func)
        assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("top_k", [EXPERTS // 2, TOP_K])  # two layers, four layers
def test_layers_collapsed_onto_different_experts_do_not_pass_for_balanced(top_k: int) -> None:
    layers = tuple(collapsed_logits(first, top_k) for first in range(0, EXPERTS, top_k))
    ours = load_balancing_loss(layers, top_k, *all_real(layers[0])).item()
    pooled = load_balancing_loss_func(layers, EXPERTS, top_k).item()
    assert pooled == pytest.approx(top_k), "pooled over layers, the collapse looks balanced"
    assert ours == pytest.approx(EXPERTS) and ours >= 2 * top_k


@BOTH_SCORES
@pytest.mark.parametrize("level", [-200.0, 80.0])
def test_losses_of_extreme_logits_are_finite(level: float, scoring_func: str) -> None:
    logits = torch.full((5, EXPERTS), level, requires_grad=True)
    real, share = all_real(logits)
    loss = load_balancing_loss((logits,), TOP_K, real, share, scoring_func)
    (loss + router_z_loss((logits,), real, share)).backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@BOTH_SCORES
def test_losses_equal_a_float64_reference(scoring_func: str) -> None:
    logits, mask, row_weights = random_batch()
    balance = load_balancing_loss(logits, TOP_K, mask, row_weights, scoring_func).item()
    reference = balance_reference(logits, TOP_K, mask, row_weights, scoring_func)
    assert balance == pytest.approx(reference, rel=1e-5)
    z_loss = router_z_loss(logits, mask, row_weights).item()
    assert z_loss == pytest.approx(z_reference(logits, mask, row_weights), rel=1e-5)


def test_z_loss_of_equal_logits_is_their_squared_logsumexp() -> None:
    logits = torch.full((5, EXPERTS), 1.5)
    expected = (1.5 + math.log(EXPERTS)) ** 2
    assert router_z_loss((logits, logits), *all_real(logits)).item() == pytest.approx(
        expected, rel=1e-6
    )


def both_losses(logits: Logits, mask: torch.Tensor, row_weights: torch.Tensor) -> torch.Tensor:
    """(2,): load balancing loss and z-loss."""
    balance = load_balancing_loss(logits, TOP_K, mask, row_weights)
    return torch.stack([balance, router_z_loss(logits, mask, row_weights)])


def test_padding_changes_nothing() -> None:
    logits, mask, row_weights = random_batch()
    garbage = tuple(
        torch.where(mask.view(-1, 1), layer, 1e4 * torch.rand_like(layer)) for layer in logits
    )
    expected = both_losses(logits, mask, row_weights)
    torch.testing.assert_close(both_losses(garbage, mask, row_weights), expected)
    for row in range(3):
        share = torch.eye(4)[row]
        cut = tuple(layer.view(4, 9, -1)[row, mask[row]] for layer in logits)
        torch.testing.assert_close(
            both_losses(cut, *all_real(cut[0])), both_losses(logits, mask, share)
        )


def test_the_loss_is_the_weighted_sum_of_the_rows() -> None:
    logits, mask, row_weights = random_batch()
    rows = torch.stack([both_losses(logits, mask, one_row) for one_row in torch.eye(4)])
    torch.testing.assert_close(both_losses(logits, mask, row_weights), row_weights @ rows)


# In the model from here on.


ROWS = ["..a......", ".........", "a.b..", "..c...."]  # one image; text only; two images; no labels


@pytest.fixture
def batch(
    tiny_config: Callable[..., Any], tiny_batch: Callable[..., dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Four rows, right-padded; the third has two label tokens, the fourth none."""
    inputs = tiny_batch(tiny_config(), ROWS, padding="right")
    text = inputs["attention_mask"].bool() & (inputs["mm_token_type_ids"] == 0)
    labels = inputs["input_ids"].where(text, -100)
    labels[2, :-4] = labels[3] = -100
    assert (labels[:, 1:] != -100).sum(1).tolist() == [7, 8, 2, 0]
    return inputs | {"labels": labels}


@pytest.fixture
def training_model(tiny_model: Callable[..., Any]) -> Callable[..., VLMoEForConditionalGeneration]:
    """`training_model(**text fields)`: both router losses with coefficient 1, in training mode."""

    def make(**text: Any) -> VLMoEForConditionalGeneration:
        return tiny_model(
            text={"router_aux_loss_coef": 1.0, "router_z_loss_coef": 1.0} | text
        ).train()

    return make


def gradients(
    model: VLMoEForConditionalGeneration, micro_batches: list[dict[str, Any]], **kwargs: Any
) -> dict[str, torch.Tensor]:
    """The gradient of every trainable parameter, accumulated over the micro-batches."""
    model.zero_grad()
    for micro_batch in micro_batches:
        model(**micro_batch, **kwargs).loss.backward()
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }


def assert_same_gradients(
    ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]
) -> None:
    """Relative L2 distance of each parameter at most 1e-5.

    Key biases have gradient zero in exact arithmetic (softmax does not see a shift), so that theirs
    is compared on the scale of the whole.
    """
    assert ours.keys() == reference.keys()
    floor = 1e-3 * max(gradient.norm() for gradient in reference.values())
    for name, gradient in reference.items():
        distance = (ours[name] - gradient).norm() / gradient.norm().clamp(min=floor)
        assert distance <= 1e-5, f"{name}: {distance:.1e}"


@BOTH_SCORES
def test_loss_is_cross_entropy_plus_weighted_router_losses(
    scoring_func: str, batch: dict[str, torch.Tensor], tiny_model: Callable[..., Any]
) -> None:
    fields = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.7, "scoring_func": scoring_func}
    output = tiny_model(text=fields)(**batch, output_router_logits=True)
    assert output.loss.item() == pytest.approx(
        F.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        ).item()
        + 0.3 * output.aux_loss.item()
        + 0.7 * output.z_loss.item(),
        rel=1e-6,
    )
    shares = (batch["labels"][:, 1:] != -100).sum(1)
    shares = shares / shares.sum()
    mask, logits = batch["attention_mask"].bool(), output.router_logits
    balance = balance_reference(logits, 2, mask, shares, scoring_func)
    assert output.aux_loss.item() == pytest.approx(balance, rel=1e-5)
    assert output.z_loss.item() == pytest.approx(z_reference(logits, mask, shares), rel=1e-5)


def test_without_labels_no_router_loss_is_computed(
    batch: dict[str, torch.Tensor], tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*args: Any) -> None:
        raise AssertionError("a router loss was computed")

    monkeypatch.setattr(modeling_vlmoe, "decoder_router_losses", must_not_run)
    model = tiny_model(text={"router_aux_loss_coef": 1.0, "router_z_loss_coef": 1.0})
    recorded = []
    model.model.register_forward_hook(
        lambda module, args, output: recorded.append(output.router_logits)
    )
    labels = batch.pop("labels")
    output = model(**batch)
    assert recorded == [None]
    assert output.loss is output.aux_loss is output.z_loss is output.router_logits is None

    coefficients = model.config.text_config
    coefficients.router_aux_loss_coef = coefficients.router_z_loss_coef = 0
    output = model(**batch, labels=labels)
    assert recorded == [None, None] and output.aux_loss is output.z_loss is None
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("asked_in", ["config", "call"])
def test_router_logits_are_fp32_one_per_sparse_layer(
    asked_in: str, with_labels: bool, batch: dict[str, torch.Tensor], tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(
        text={"mlp_only_layers": [1], "output_router_logits": asked_in == "config"}
    ).bfloat16()
    if not with_labels:
        batch.pop("labels")
    output = model(**batch, **({"output_router_logits": True} if asked_in == "call" else {}))
    assert isinstance(output.router_logits, tuple)
    tokens = batch["input_ids"].numel()
    assert [(*layer.shape, layer.dtype) for layer in output.router_logits] == [
        (tokens, 4, torch.float32)
    ] * 2
    assert model(**batch, output_router_logits=False).router_logits is None


@pytest.mark.parametrize("rows_at_a_time", [1, 2])
@pytest.mark.parametrize("text_only_has_pixels", [True, False])
def test_gradient_does_not_depend_on_how_rows_are_split(
    text_only_has_pixels: bool,
    rows_at_a_time: int,
    batch: dict[str, torch.Tensor],
    training_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    model = training_model()
    num_items = (batch["labels"][:, 1:] != -100).sum()
    splits = [
        {name: values[start : start + rows_at_a_time] for name, values in batch.items()}
        for start in range(0, len(ROWS), rows_at_a_time)
    ]
    for split in splits:
        if not (text_only_has_pixels or split["pixel_values"].any()):
            del split["pixel_values"], split["pixel_attention_mask"]
    whole = gradients(model, [batch], num_items_in_batch=num_items)
    assert whole.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert_same_gradients(gradients(model, splits, num_items_in_batch=num_items), whole)
    assert_same_gradients(
        gradients(model, [batch]), whole
    )  # the batch's own labels are the default
    assert_same_gradients(gradients(model, splits[::-1], num_items_in_batch=int(num_items)), whole)


def test_a_micro_batch_without_label_tokens_has_zero_loss_and_zero_gradients(
    batch: dict[str, torch.Tensor], training_model: Callable[..., VLMoEForConditionalGeneration]
) -> None:
    model = training_model()
    unlabelled = batch | {"labels": torch.full_like(batch["labels"], -100)}
    for num_items in (None, 0, 17):
        assert model(**unlabelled, num_items_in_batch=num_items).loss.item() == 0
        grads = gradients(model, [unlabelled], num_items_in_batch=num_items)
        assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        assert not any(gradient.any() for gradient in grads.values())


@pytest.mark.parametrize("every_n_layers", [1, 3])  # all layers; of the decoder's only the second
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    use_reentrant: bool,
    every_n_layers: int,
    batch: dict[str, torch.Tensor],
    training_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    model = training_model()
    expected = gradients(model, [batch])
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant}, every_n_layers)
    assert_same_gradients(gradients(model, [batch]), expected)
    output = model(**batch, output_router_logits=True)
    output.loss.backward()
    assert len(output.router_logits) == 3, "recomputation recorded the logits again"


def test_only_the_last_layer_can_be_trained(
    batch: dict[str, torch.Tensor], training_model: Callable[..., VLMoEForConditionalGeneration]
) -> None:
    model = training_model().requires_grad_(False)
    last = model.model.language_model.layers[-1].requires_grad_()
    model(**batch).loss.backward()
    assert all(parameter.grad.any() for parameter in last.parameters())


@pytest.mark.parametrize("trains", [True, False, None])
def test_losses_are_on_while_a_router_trains(
    tiny_model: Callable[..., VLMoEForConditionalGeneration], trains: bool | None
) -> None:
    """None: FSDP has taken the parameters away into one of its own, and which of it trains is not
    known."""
    model = tiny_model(text={"router_aux_loss_coef": 1.0})
    for layer in model.model.language_model.layers:
        router = layer.mlp.router
        router.weight.requires_grad_(bool(trains))
        if trains is None:
            weight = router.weight.detach()
            del router.weight
            router.weight = weight
    ids = torch.arange(6, 20).view(2, 7)
    assert (model(input_ids=ids, labels=ids).aux_loss is not None) == (trains is not False)
