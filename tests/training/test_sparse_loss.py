"""The loss of transformers' own sparse models does not depend on how a step's rows are split."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assistant, user
from builders import row as conversation
from fsdp_ranks import fsdp2_of, is_sharded, shard_on_cpus
from peft import LoraConfig, get_peft_model
from ranks import WORLD_SIZE, on_ranks
from sparse_families import (
    FAMILIES,
    PLAIN_VISION,
    SPARSE_TEXTS,
    TEXT,
    WITH_BIAS,
    FamilyCollator,
    row,
    sparse_family,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import vlmoe
from vlmoe import VLMoEForConditionalGeneration
from vlmoe.data.collator import VLMoECollator
from vlmoe.processing.processing_vlmoe import VLMoEProcessor
from vlmoe.routing.routed_layers import routed_layers, selection_bias
from vlmoe.routing.scoring import router_scoring
from vlmoe.training.sparse_loss import SparseLoss

FAST = ("mixtral", "qwen3_vl_moe")
TOLERANCE = 1e-5
ROWS = ((1, 9, 3), (2, 6, 1), (0, 20, 15), (1, 12, 2), (1, 7, 0), (0, 9, 8), (1, 25, 20), (1, 5, 1))
"""(images, text tokens, of these at the end with a label) of each row."""

Gradients = dict[str, torch.Tensor]


def make_rows(name: str) -> list[dict[str, torch.Tensor]]:
    """Return `ROWS`, without images for a language model."""
    with_images = name not in SPARSE_TEXTS
    return [
        row(length, labels, seed, images * with_images)
        for seed, (images, length, labels) in enumerate(ROWS)
    ]


def coefficients(name: str) -> dict[str, float]:
    """Both losses at 1; Gemma 4's routers return probabilities, which have no z-loss."""
    return {"balance": 1.0, "z": 0.0 if name == "gemma4" else 1.0}


def families(names: Sequence[str]) -> list[Any]:
    """Mark those that are not `FAST` as slow."""
    return [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in names]


class Recorder(TrainerCallback):
    """Keeps the gradients of the step."""

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        """Before the step; nothing was clipped."""
        self.gradients = {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }


def step(
    name: str, folder: Path, accumulate: int = 1, checkpointing: bool = False, own: bool = False
) -> Gradients:
    """Return the gradients of one step of Trainer, in as many processes as it finds.

    Args:
        name: of the family.
        folder: for Trainer.
        accumulate: micro-batches.
        checkpointing: whether layers are computed again.
        own: by the model's own loss, which is on where the class has one.
    """
    rows = make_rows(name)
    arguments = TrainingArguments(
        output_dir=str(folder),
        gradient_accumulation_steps=accumulate,
        activation_checkpointing=checkpointing,
        max_steps=1,
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=True,
        use_cpu=True,
    )
    arguments.per_device_train_batch_size = len(rows) // (accumulate * arguments.world_size)
    fields = {"output_router_logits": True, "router_aux_loss_coef": 1.0} if own else {}
    model, recorder = sparse_family(name, **fields), Recorder()
    loss = None if own else SparseLoss(model, **coefficients(name))
    Trainer(
        model,
        arguments,
        FamilyCollator(name),
        train_dataset=rows,
        callbacks=[recorder],
        compute_loss_func=loss,
    ).train()
    return recorder.gradients


def distance(ours: Gradients, whole: Gradients) -> tuple[float, float]:
    """Return the relative distance of all gradients as one, and that of the worst router."""
    assert ours.keys() == whole.keys()
    together, reference = (torch.cat([g[n].flatten() for n in whole]) for g in (ours, whole))
    routers = [
        ((ours[name] - g).norm() / g.norm()).item()
        for name, g in whole.items()
        if name.endswith(("gate.weight", "router.weight", "router.proj.weight"))
    ]
    assert routers
    return ((together - reference).norm() / reference.norm()).item(), max(routers)


@pytest.mark.parametrize("name", families(FAMILIES))
def test_accumulation_and_checkpointing_do_not_change_the_gradient(
    name: str, tmp_path: Path
) -> None:
    whole = step(name, tmp_path)
    for way in ((8, False), (8, True)):
        assert max(distance(step(name, tmp_path, *way), whole)) <= TOLERANCE
    own = [step(name, tmp_path, n, own=True) for n in (1, 8)]
    print(f"{name}: the model's own loss is off by", *distance(own[1], own[0]))


def steps_on_a_rank(folder: Path, names: Sequence[str]) -> dict[tuple[str, int], Gradients]:
    """Return the gradients of each family for two ways to split this rank's rows."""
    return {(name, n): step(name, folder, n) for name in names for n in (1, 4)}


RANKED = ("qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe", "gemma4", "mixtral", "ernie4_5_vl_moe")


@pytest.mark.slow
def test_ranks_do_not_change_the_gradient(tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    folder.mkdir()
    ranks = on_ranks(steps_on_a_rank, tmp_path, RANKED, folder=folder)
    assert len(ranks) == WORLD_SIZE
    for name in RANKED:
        whole = step(name, tmp_path)
        for of_rank in ranks:
            for n in (1, 4):
                assert max(distance(of_rank[name, n], whole)) <= TOLERANCE, (name, n)


def fsdp2_on_a_rank(folder: Path, names: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Return each family's weights after two steps, cut over the ranks."""
    return {name: weights_after_two_steps(name, folder, sharded=True) for name in names}


def weights_after_two_steps(
    name: str, folder: Path, sharded: bool = False
) -> dict[str, torch.Tensor]:
    """Return the weights after two steps of SGD with all losses and the update of biases."""
    rows = make_rows(name)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **fsdp2_of(name) if sharded else {},
    )
    arguments.per_device_train_batch_size = len(rows) // arguments.world_size
    if sharded:
        arguments = shard_on_cpus(arguments)
    model = sparse_family(name)
    trainer = Trainer(
        model,
        arguments,
        FamilyCollator(name),
        train_dataset=rows,
        callbacks=[vlmoe.RouterBiasCallback(0.01)] if name in WITH_BIAS else [],
        compute_loss_func=SparseLoss(model, **coefficients(name)),
    )
    trainer.train()
    if not sharded:
        return trainer.model.state_dict()
    assert is_sharded(trainer)
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


@pytest.mark.slow
def test_fsdp2_changes_neither_weights_nor_biases(tmp_path: Path) -> None:
    names, folder = ("llava_qwen3_moe", "ernie4_5_vl_moe"), tmp_path / "ranks"
    folder.mkdir()
    sharded = on_ranks(fsdp2_on_a_rank, tmp_path, names, folder=folder)[0]
    for name in names:
        whole, before = weights_after_two_steps(name, tmp_path), sparse_family(name).state_dict()
        assert sharded[name].keys() == whole.keys()
        for key, ours in sharded[name].items():
            moved = (whole[key] - before[key]).norm()
            assert (ours - whole[key]).norm() <= TOLERANCE * moved.clamp(min=1e-3), key
            if key.endswith("correction_bias"):
                assert torch.equal(ours, whole[key]) and ours.any()


def by_hand(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return balancing loss and z-loss, token by token in float64."""
    seen: dict[str, torch.Tensor] = {}
    layers = routed_layers(model)
    for layer in layers:
        layer.router.register_forward_hook(
            lambda module, args, output, name=layer.name: seen.update({name: output[0].detach()})
        )
    with torch.no_grad():
        model(**{key: value for key, value in batch.items() if key != "labels"})
    labels, mask = batch["labels"][:, 1:] != -100, batch["attention_mask"].bool()
    types = batch.get("moe_mm_token_type_ids", torch.zeros_like(mask)).bool()
    balance = z = 0.0
    for layer in layers:
        bank = types if layer.place == "vision" else ~types
        output, scoring = iter(seen[layer.name].double()), router_scoring(layer)
        everywhere = bank if len(seen[layer.name]) < mask.numel() else torch.ones_like(mask)
        count = sum(other.place == layer.place for other in layers)
        for at in range(len(mask)):
            weight = (labels[at].sum() / labels.sum()).item() / count
            chosen, total = torch.zeros(layer.num_experts), torch.zeros(layer.num_experts).double()
            tokens, squares, real = 0, 0.0, mask[at].sum().item()
            for t in range(mask.shape[1]):
                if not everywhere[at, t]:
                    continue
                logits = next(output)
                if not mask[at, t]:
                    continue
                scores = logits.sigmoid() if scoring.kind == "sigmoid" else logits.softmax(-1)
                if scoring.kind == "probabilities":
                    scores = logits
                allowed = scores.clone()
                if scoring.n_group > 1:
                    pairs = allowed.view(scoring.n_group, -1)
                    best = pairs.topk(2, dim=-1).values.sum(-1).argmax()
                    keep = torch.zeros_like(pairs, dtype=torch.bool)
                    keep[best] = True
                    allowed = pairs.masked_fill(~keep, -1).flatten()
                for expert in allowed.argsort(descending=True)[: layer.top_k]:
                    chosen[expert] += 1
                total += scores / scores.sum()
                squares += logits.logsumexp(-1).item() ** 2
                tokens += 1
            if tokens:
                shares = (chosen / tokens) * (total / real)
                balance += weight * layer.num_experts * shares.sum().item()
                z += weight * squares / real
    return balance, z


HAND_COUNTED = (
    "mixtral",
    "deepseek_v3",
    "ernie4_5_vl_moe",
    "gemma4",
    "llava_qwen3_moe",
    "lfm2_moe",
)


@pytest.mark.parametrize("name", HAND_COUNTED)
def test_the_losses_are_those_counted_by_hand_without_the_selection_bias(name: str) -> None:
    model = sparse_family(name).train()
    for layer in routed_layers(model):
        if (bias := selection_bias(layer)) is not None:  # other experts are chosen than counted
            bias.data.copy_(torch.linspace(-1, 1, layer.num_experts).expand_as(bias))
    loss = SparseLoss(model, **coefficients(name))
    batch = FamilyCollator(name)(make_rows(name))
    labels = batch["labels"]
    total = loss(model(**{k: v for k, v in batch.items() if k != "labels"}), labels)
    balance, z = by_hand(model, batch)
    assert loss.last.aux_loss is not None
    assert loss.last.aux_loss.item() == pytest.approx(balance, rel=1e-5)
    if name != "gemma4":
        assert loss.last.z_loss is not None
        assert loss.last.z_loss.item() == pytest.approx(z, rel=1e-5)
    plain = sparse_family(name).train()
    plain.load_state_dict(model.state_dict())
    cross_entropy = plain(**batch).loss.item()
    expected = cross_entropy + balance + z * coefficients(name)["z"]
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_evaluation_weighs_by_the_labels_of_the_batch() -> None:
    model = sparse_family("mixtral").eval()
    loss = SparseLoss(model, balance=1.0)
    batch = FamilyCollator("mixtral")(make_rows("mixtral"))
    labels = batch.pop("labels")
    number = (labels[:, 1:] != -100).sum()
    with torch.no_grad():
        without, given = (loss(model(**batch), labels, n) for n in (None, number))
    assert without == given and without.isfinite()
    nothing = torch.full_like(labels, -100)
    assert loss(model(**batch), nothing) == 0


EVERYWHERE: dict[str, Any] = {
    "vision_num_experts": 5,
    "vision_sparse_layers": [1],
    "projector_num_experts": 3,
}


@pytest.mark.parametrize("fields", [{}, EVERYWHERE], ids=["decoder", "everywhere"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_vlmoe_it_is_the_loss_of_the_forward_pass_without_a_warning(
    fields: dict[str, Any],
    checkpointing: bool,
    model_folder: Path,
    make_image: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = vlmoe.VLMoEConfig.from_pretrained(model_folder)
    config = vlmoe.VLMoEConfig(**config.to_dict() | fields)
    rows = [
        conversation(user("what is it? " * n, n % 3), assistant("yes " * (n + 1)), images=images)
        for n in range(4)
        for images in [[make_image(10 * n + i) for i in range(n % 3)]]
    ]
    batch = VLMoECollator(VLMoEProcessor.from_pretrained(model_folder))(rows)
    losses, gradients = [], []
    for ours in (False, True):
        torch.manual_seed(0)
        model = VLMoEForConditionalGeneration(config).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        given = dict(batch)
        labels = given["labels"]
        with caplog.at_level(logging.WARNING):
            if ours:
                given.pop("labels")
                sparse_loss = SparseLoss(model)
                loss = sparse_loss(model(**given), labels, num_items_in_batch=torch.tensor(50))
                assert sparse_loss.last.aux_loss is not None
            else:
                loss = model(**given, num_items_in_batch=torch.tensor(50)).loss
            loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)
    assert "router" not in caplog.text.lower()


def batch_of(name: str = "mixtral") -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return inputs without labels, and the labels."""
    batch = FamilyCollator(name)(make_rows(name))
    labels = batch.pop("labels")
    return batch, labels


def test_logits_without_a_graph_are_an_error() -> None:
    model = sparse_family("mixtral").train()
    loss = SparseLoss(model)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    batch, labels = batch_of()
    with pytest.raises(RuntimeError, match=r"have no graph.*use_reentrant"):
        loss(model(**batch), labels)


def test_a_model_that_was_not_listened_to_is_an_error() -> None:
    model, other = sparse_family("mixtral").train(), sparse_family("mixtral").train()
    loss = SparseLoss(other)
    batch, labels = batch_of()
    with pytest.raises(RuntimeError, match="No router of MixtralForCausalLM was seen"):
        loss(model(**batch), labels)
    outputs = other(**batch)
    loss(outputs, labels)
    with pytest.raises(RuntimeError, match="once after each forward pass"):
        loss(outputs, labels)
    loss.remove()
    with pytest.raises(RuntimeError, match="No router"):
        loss(other(**batch), labels)


def test_labels_must_be_there_one_for_each_position() -> None:
    model = sparse_family("mixtral").train()
    loss = SparseLoss(model)
    batch, labels = batch_of()
    with pytest.raises(ValueError, match="no `labels`"):
        loss(model(**batch), None)
    with pytest.raises(ValueError, match=r"`labels` is \(8, 24\)"):
        loss(model(**batch), labels[:, 1:])


def test_models_that_it_cannot_train_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="Linear holds no PreTrainedModel"):
        SparseLoss(nn.Linear(2, 2))
    paligemma = AutoConfig.for_model(
        "paligemma",
        text_config=TEXT | {"model_type": "gemma"},
        vision_config=PLAIN_VISION | {"model_type": "siglip_vision_model"},
    )
    with pytest.raises(ValueError, match="PaliGemmaForConditionalGeneration needs `labels`"):
        SparseLoss(AutoModelForImageTextToText.from_config(paligemma))
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has no experts"):
        SparseLoss(sparse_family("qwen3"), balance=0.1)
    phimoe = AutoConfig.for_model("phimoe", **TEXT, num_local_experts=4)
    with pytest.raises(ValueError, match=r"PhimoeTopKRouter .* none of the known ways"):
        SparseLoss(AutoModelForCausalLM.from_config(phimoe))
    with pytest.raises(ValueError, match="Gemma4ForConditionalGeneration return probabilities"):
        SparseLoss(sparse_family("gemma4"), balance=1.0, z=0.1)
    with pytest.raises(ValueError, match="Gemma4TextConfig has no router_aux_loss_coef: give"):
        SparseLoss(sparse_family("gemma4"))
    with pytest.raises(ValueError, match=r"`z` is -1"):
        SparseLoss(sparse_family("mixtral"), z=-1)


@pytest.mark.parametrize("train_routers", [False, True])
def test_adapters_are_balanced_where_they_train_the_routers(train_routers: bool) -> None:
    adapters = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj"],
        modules_to_save=["gate"] if train_routers else None,
    )
    model = get_peft_model(sparse_family("mixtral"), adapters).train()
    loss = SparseLoss(model, balance=1.0)
    batch, labels = batch_of()
    loss(model(**batch), labels).backward()
    assert (loss.last.aux_loss is not None) == train_routers
    routers = [p.grad for n, p in model.named_parameters() if "gate.modules_to_save" in n]
    assert len(routers) == 2 * train_routers
    assert all(gradient is not None and gradient.any() for gradient in routers)


def test_it_is_at_the_front_door() -> None:
    assert vlmoe.SparseLoss is SparseLoss
