"""One optimizer step of `transformers.Trainer` gives one update, however its batch is split.

Both router losses have coefficient 1, so that they show. The gradients are those before clipping,
compared tensor by tensor with one backward pass over the whole batch, without Trainer.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from builders import assistant, row, user
from PIL import Image
from ranks import WORLD_SIZE, on_ranks
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration
from vlmoe.data.collator import VLMoECollator
from vlmoe.processing.processing_vlmoe import VLMoEProcessor
from vlmoe.training.riding_losses import RouterLossRide

KINDS: dict[str, dict[str, Any]] = {  # fields of the configuration
    "experts in the decoder": {},
    "experts everywhere": {
        "vision_num_experts": 5,
        "vision_sparse_layers": [1],
        "projector_num_experts": 3,
    },
}
Gradients = dict[str, torch.Tensor]
Rows = list[dict[str, Any]]

TOLERANCE = 1e-5
ANSWERS = ("blue", "two", "yes, it is a red circle, and what a shape", "no")
LEARNING_RATE = 0.5


class FirstTokenLabelled(VLMoECollator):
    """The first token of every row is labelled: no token predicts it, and it must count nowhere."""

    def __call__(self, rows: Any) -> dict[str, torch.Tensor]:
        """As in `VLMoECollator`."""
        batch = super().__call__(rows)
        batch["labels"][:, 0] = batch["input_ids"][:, 0]
        return batch


class Recorder(TrainerCallback):
    """Keeps the gradients of the step, and checks that the step is SGD's."""

    def on_pre_optimizer_step(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        """Before the step; nothing was clipped."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.gradients = {name: p.grad.clone() for name, p in trained.items()}
        self.before = {name: p.detach().clone() for name, p in trained.items()}

    def on_optimizer_step(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        """After the step."""
        for name, before in self.before.items():
            expected = before - LEARNING_RATE * self.gradients[name]
            torch.testing.assert_close(model.get_parameter(name).detach(), expected)


def collator(model_folder: Path) -> VLMoECollator:
    """The collator of the model saved in `folder`."""
    return FirstTokenLabelled(VLMoEProcessor.from_pretrained(model_folder))


class RidingTrainer(Trainer):
    """Its loss is computed outside of the model, and the router losses ride."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """Cross-entropy, summed over label tokens, over those of the step, of all ranks."""
        labels = inputs.pop("labels")[:, 1:]
        share = self.args.world_size / num_items_in_batch  # gradients are averaged over ranks
        with RouterLossRide(model, (labels != -100).sum(-1) * share) as ride:
            logits = model(**inputs).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") * share
        return ride.carried_by(loss)


def trained(
    model_folder: Path,
    rows: Rows,
    accumulate: int,
    checkpointing: bool,
    scope: str = "sequence",
    rides: bool = False,
) -> Gradients:
    """The gradients of one step of Trainer, in as many processes as it finds."""
    arguments = TrainingArguments(
        output_dir=str(model_folder / "output"),
        gradient_accumulation_steps=accumulate,
        activation_checkpointing=checkpointing,
        max_steps=1,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    splits = accumulate * arguments.world_size
    arguments.per_device_train_batch_size = len(rows) // splits
    model, recorder = VLMoEForConditionalGeneration.from_pretrained(model_folder), Recorder()
    model.config.text_config.router_aux_loss_scope = scope
    trainer = (RidingTrainer if rides else Trainer)(
        model, arguments, collator(model_folder), train_dataset=rows, callbacks=[recorder]
    )
    trainer.train()
    assert model.is_activation_checkpointing == checkpointing
    assert isinstance(trainer.model_wrapped, DistributedDataParallel) == dist.is_initialized()
    return recorder.gradients


def trained_on_a_rank(model_folder: Path, rows: Rows) -> dict[tuple[Any, ...], Gradients]:
    """`trained` for each way to split the rows over two ranks, and for scope `"global"`."""
    ways: list[tuple[Any, ...]] = [(n, again) for n in (1, 2, 4) for again in (False, True)]
    ways += [(1, again, "global") for again in (False, True)]
    ways += [(n, again, "sequence", True) for n, again in ((1, False), (4, True))]
    return {way: trained(model_folder, rows, *way) for way in ways}


def distances(ours: Gradients, reference: Gradients) -> dict[str, float]:
    """Relative L2 distance of each parameter.

    Biases of keys have gradient zero in exact arithmetic, as softmax does not see a shift: theirs
    is taken relative to the bias of the queries.
    """
    assert ours.keys() == reference.keys()
    return {
        name: (
            (ours[name] - gradient).norm()
            / reference[name.replace("k_proj.bias", "q_proj.bias")].norm()
        ).item()
        for name, gradient in reference.items()
    }


@pytest.fixture(scope="module", params=KINDS)
def model_folder(
    request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The model with both router losses, its experts in one of `KINDS` of places."""
    if not KINDS[request.param]:
        return model_folder
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    config = VLMoEConfig.from_pretrained(folder)
    config = VLMoEConfig(**config.to_dict() | KINDS[request.param])
    torch.manual_seed(0)
    VLMoEForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(make_image: Callable[..., Image.Image]) -> Rows:
    """Eight rows, of 0, 1 and 2 images and of unlike lengths; the sixth has no answer.

    Two of them show the same image, which is encoded once where they are in one batch.
    """
    rows = []
    for number, images in enumerate((1, 2, 0, 1, 1, 1, 0, 1)):
        messages = [user("what is it? " * number, images)]
        if number != 5:
            answer = " and ".join(ANSWERS[: number % len(ANSWERS) + 1])
            messages.append(assistant(answer))
        shown = [make_image(10 * (number % 7) + i) for i in range(images)]
        rows.append(row(*messages, images=shown))
    return rows


@pytest.fixture(scope="module")
def reference(model_folder: Path, rows: Rows) -> Gradients:
    """One backward pass over the whole batch."""
    batch = collator(model_folder)(rows)
    assert len(rows) == 8 and not batch["attention_mask"].all(), "no row is padded"
    assert ((batch["labels"][:, 1:] != -100).sum(-1) == 0).tolist() == [n == 5 for n in range(8)]
    tiles = (batch["image_index"] >= 0).sum(-1)
    assert sorted(set(tiles.tolist())) == [0, 1, 2]
    assert len(batch["pixel_values"]) == tiles.sum() - 1, "no image is shared"
    model = VLMoEForConditionalGeneration.from_pretrained(model_folder).train()
    model(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
def test_the_gradient_does_not_depend_on_accumulation_or_checkpointing(
    accumulate: int, checkpointing: bool, model_folder: Path, rows: Rows, reference: Gradients
) -> None:
    far = distances(trained(model_folder, rows, accumulate, checkpointing), reference)
    assert any("router" in name for name in far)
    assert max(far.values()) <= TOLERANCE, max(far.items(), key=lambda item: item[1])


@pytest.mark.parametrize(("accumulate", "checkpointing"), [(1, False), (4, True)])
def test_riding_router_losses_give_the_same_gradient(
    accumulate: int, checkpointing: bool, model_folder: Path, rows: Rows, reference: Gradients
) -> None:
    way = accumulate, checkpointing, "sequence", True
    far = distances(trained(model_folder, rows, *way), reference)
    assert max(far.values()) <= TOLERANCE, max(far.items(), key=lambda item: item[1])


@pytest.mark.slow
def test_the_gradient_does_not_depend_on_the_number_of_ranks(
    model_folder: Path, rows: Rows, reference: Gradients, tmp_path: Path
) -> None:
    pooled = trained(model_folder, rows, 1, False, "batch")
    assert max(distances(pooled, reference).values()) > 1000 * TOLERANCE
    ranks = on_ranks(trained_on_a_rank, model_folder, rows, folder=tmp_path)
    assert len(ranks) == WORLD_SIZE and len(ranks[0]) == 10
    for of_rank in ranks:
        for way, gradients in of_rank.items():
            far = distances(gradients, pooled if "global" in way else reference)
            assert max(far.values()) <= TOLERANCE, (way, max(far.items(), key=lambda item: item[1]))


@pytest.mark.parametrize("scope", ["batch", "global"])
def test_the_other_scopes_depend_on_the_split(scope: str, model_folder: Path, rows: Rows) -> None:
    whole, split = (trained(model_folder, rows, n, False, scope) for n in (1, 4))
    far = distances(split, whole)
    assert min(value for name, value in far.items() if "router" in name) > 1000 * TOLERANCE
