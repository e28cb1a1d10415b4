"""TRL's SFTTrainer and DPOTrainer with the router losses, on rows with none, one and two images."""

import copy
import logging
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import assistant, user
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.data.collator import IGNORE_INDEX, VLMoECollator, VLMoEPreferenceCollator
from vlmoe.hub.model_card import MARKER
from vlmoe.modeling_vlmoe.router_losses import global_entropy_loss
from vlmoe.processing.processing_vlmoe import VLMoEProcessor
from vlmoe.training.trl_trainers import VLMoEDPOTrainer, VLMoESFTTrainer

AUX_COEF, Z_COEF = 0.5, 0.05
WARNING = "Router losses are enabled"
Model = Callable[..., VLMoEForConditionalGeneration]
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL reports each run to the Hub, except on CI."""
    monkeypatch.setenv("CI", "1")


@pytest.fixture(scope="module")
def rows(make_image: Callable[..., Image.Image]) -> Dataset:
    """Rows with unequal numbers of label tokens: an image, none, two in two turns, an image."""
    two_turns = [user("which?", 2), assistant("the first"), user("and why?"), assistant("a circle")]
    conversations = [
        ([user("what color?", 1), assistant("blue")], 1),
        ([user("what is one and one?"), assistant("it is two, and yes, it is not three")], 0),
        (two_turns, 2),
        ([user("is it red?", 1), assistant("no")], 1),
    ]
    return Dataset.from_list(
        [
            {"messages": messages, "images": [make_image(10 * row + i) for i in range(count)]}
            for row, (messages, count) in enumerate(conversations)
        ]
    )


@pytest.fixture(scope="module")
def pairs(rows: Dataset) -> Dataset:
    """The same rows, their last answer against a worse one."""
    return Dataset.from_list(
        [
            {
                "prompt": row["messages"][:-1],
                "chosen": row["messages"][-1:],
                "rejected": [assistant("a red shape")],
                "images": row["images"],
            }
            for row in rows
        ]
    )


@pytest.fixture
def make_model(tiny_model: Model, processor: VLMoEProcessor) -> Model:
    """Always the same model; `make_model(z=0)` and the like change its coefficients."""

    def make(
        aux: float = AUX_COEF, z: float = Z_COEF, **fields: Any
    ) -> VLMoEForConditionalGeneration:
        text = {"router_aux_loss_coef": aux, "router_z_loss_coef": z, "num_hidden_layers": 2}
        return tiny_model(text=text | {"vocab_size": len(processor.tokenizer)}, **fields)

    return make


@pytest.fixture
def make_trainer(
    make_model: Model, processor: VLMoEProcessor, rows: Dataset, pairs: Dataset, tmp_path: Path
) -> Make:
    """`make_trainer(VLMoESFTTrainer, max_steps=3, ...)`: a trainer on `rows` or `pairs`."""
    arguments = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }

    def make(
        kind: type[Trainer],
        model: VLMoEForConditionalGeneration | None = None,
        options: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Trainer:
        model, options = model or make_model(), options or {}
        if issubclass(kind, DPOTrainer):
            reference = None if "peft_config" in options else copy.deepcopy(model)
            used = {"train_dataset": pairs, "eval_dataset": pairs, "ref_model": reference}
            args: TrainingArguments = DPOConfig(**arguments | fields)
        elif issubclass(kind, SFTTrainer):
            used = {"train_dataset": rows, "eval_dataset": rows}
            args = SFTConfig(**arguments | {"assistant_only_loss": True} | fields)
        else:
            used = {"train_dataset": rows, "eval_dataset": rows}
            used["data_collator"] = VLMoECollator(processor)
            args = TrainingArguments(**arguments | {"remove_unused_columns": False} | fields)
        return kind(model=model, args=args, processing_class=processor, **used | options)

    return make


def logged(trainer: Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def router_losses(
    model: VLMoEForConditionalGeneration, batch: dict[str, torch.Tensor], weights: list[float]
) -> float:
    """Coefficients times balance loss and z-loss, row by row and layer by layer in plain Python."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "completion_mask")}
    with torch.no_grad():
        layers = model.eval()(**inputs, output_router_logits=True).router_logits
    total = 0.0
    for layer in layers:
        by_row = layer.unflatten(0, batch["input_ids"].shape)
        for logits, real, weight in zip(by_row, batch["attention_mask"], weights, strict=True):
            logits = logits[real.bool()]  # (tokens, experts)
            chosen = F.one_hot(logits.topk(2).indices, 4).sum(1).float().mean(0)
            balance = 4 * (chosen * logits.softmax(-1).mean(0)).sum()
            z_loss = logits.logsumexp(-1).square().mean()
            total += weight / len(layers) * float(AUX_COEF * balance + Z_COEF * z_loss)
    return total


@pytest.mark.parametrize("only_answers", [False, True])
def test_no_collator_opens_a_url(
    make_trainer: Make, only_answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: pytest.fail("a request"))
    trainer = make_trainer(VLMoESFTTrainer, assistant_only_loss=only_answers)
    row = {
        "messages": [user("what?", 1), assistant("blue")],
        "images": ["http://127.0.0.1:9/a.png"],
    }
    with pytest.raises(ValueError, match="is a URL, and data do not make requests"):
        trainer.data_collator([row])
    assert trainer.processing_class.opens_urls


@pytest.mark.parametrize("kind", [VLMoESFTTrainer, VLMoEDPOTrainer])
def test_twenty_steps_lower_a_finite_loss(kind: type[Trainer], make_trainer: Make) -> None:
    trainer = make_trainer(kind, max_steps=20, gradient_accumulation_steps=2)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = logged(trainer)
    assert len(losses) == 20 and all(map(math.isfinite, losses))
    assert all(b < a for a, b in zip(losses[:-4:4], losses[4::4], strict=True))
    assert trainer.evaluate()["eval_loss"] < 0.7 * before
    text_config = trainer.model.config.text_config
    assert text_config.router_aux_loss_coef == AUX_COEF and not text_config.output_router_logits


@pytest.mark.parametrize("kind", [VLMoESFTTrainer, SFTTrainer])
def test_sft_labels_are_those_of_our_collator(
    kind: type[Trainer], make_trainer: Make, rows: Dataset, processor: VLMoEProcessor
) -> None:
    """TRL's own collator, too: our chat template and processor leave it no choice."""
    trainer = make_trainer(
        kind, per_device_train_batch_size=4, train_sampling_strategy="sequential"
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = VLMoECollator(processor)(list(rows))
    learnt = [ids[ids != IGNORE_INDEX] for ids in batch["labels"]]
    texts = [processor.tokenizer.decode(ids) for ids in learnt]
    assert texts[2] == "the first<|end|> a circle<|end|>" and len(texts) == 4
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(batch[name], values), name


def test_the_logged_sft_loss_is_cross_entropy_and_the_router_losses(
    make_trainer: Make, make_model: Model, rows: Dataset, processor: VLMoEProcessor
) -> None:
    trainer = make_trainer(VLMoESFTTrainer, gradient_accumulation_steps=2)
    trainer.train()
    batch, model = VLMoECollator(processor)(list(rows)), make_model()
    counts = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(-1)
    expected = router_losses(model, batch, (counts / counts.sum()).tolist())
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1]
    expected += F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).item()
    assert logged(trainer)[0] == pytest.approx(expected, rel=1e-5)
    for metrics in (None, lambda prediction: {"vocabulary": prediction.predictions.shape[-1]}):
        evaluated = make_trainer(
            VLMoESFTTrainer, options={"compute_metrics": metrics}, per_device_eval_batch_size=4
        ).evaluate()
        assert evaluated["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert evaluated["eval_vocabulary"] == len(processor.tokenizer)


@pytest.mark.parametrize("kind", [VLMoESFTTrainer, VLMoEDPOTrainer])
def test_the_losses_of_tower_and_connector_are_in_trls_loss(
    kind: type[Trainer],
    make_trainer: Make,
    make_model: Model,
    rows: Dataset,
    pairs: Dataset,
    processor: VLMoEProcessor,
) -> None:
    experts = {"vision_num_experts": 5, "projector_num_experts": 3}
    trainer = make_trainer(kind, make_model(**experts), gradient_accumulation_steps=2)
    trainer.train()
    model = make_model(**experts).train()
    if kind is VLMoESFTTrainer:
        expected = model(**VLMoECollator(processor)(list(rows))).loss
    else:
        batch = VLMoEPreferenceCollator(processor)(list(pairs))
        weights = torch.full((8,), 1 / 8)
        del batch["completion_mask"]
        output = model.model(**batch, output_router_logits=True)
        assert len(output.vision_router_logits) == 3
        expected = (
            math.log(2)
            + model.router_losses(
                output.router_logits,
                batch["attention_mask"].bool(),
                weights,
                vision_router_logits=output.vision_router_logits,
                shown_tiles=output.shown_tiles,
            ).total
        )
    assert logged(trainer)[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("fields", [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}])
def test_trls_other_losses_get_the_router_losses_too(
    fields: dict[str, Any],
    make_trainer: Make,
    make_model: Model,
    rows: Dataset,
    processor: VLMoEProcessor,
) -> None:
    losses = []
    for model in (make_model(), make_model(0, 0)):
        trainer = make_trainer(VLMoESFTTrainer, model, per_device_train_batch_size=4, **fields)
        trainer.train()
        losses += logged(trainer)
    batch = VLMoECollator(processor)(list(rows))
    counts = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(-1)
    expected = router_losses(make_model(), batch, (counts / counts.sum()).tolist())
    assert losses[0] - losses[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_logged_dpo_loss_is_the_preference_loss_and_the_router_losses(
    adapter: bool, make_trainer: Make, make_model: Model, pairs: Dataset, processor: VLMoEProcessor
) -> None:
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    options = {"peft_config": lora} if adapter else {}
    trainer = make_trainer(VLMoEDPOTrainer, options=options, gradient_accumulation_steps=2)
    trainer.train()
    batch = VLMoEPreferenceCollator(processor)(list(pairs))
    # An adapter on attention leaves the routers frozen.
    expected = 0 if adapter else router_losses(make_model(), batch, [1 / 8] * 8)
    # The policy is the reference still: each pair has the loss log 2.
    assert logged(trainer)[0] == pytest.approx(math.log(2) + expected, rel=1e-5)


def test_the_terms_of_the_modalities_are_in_trls_loss(
    make_trainer: Make, make_model: Model, rows: Dataset, processor: VLMoEProcessor
) -> None:
    losses = []
    for coefficient in ({"image": 2.0, "text": 0.5}, None):
        model = make_model(0, 0)
        model.config.text_config.router_global_entropy_coef = coefficient
        trainer = make_trainer(VLMoESFTTrainer, model, per_device_train_batch_size=4)
        trainer.train()
        losses += logged(trainer)
    batch, model = VLMoECollator(processor)(list(rows)), make_model(0, 0)
    with torch.no_grad():
        logits = model(**batch, output_router_logits=True).router_logits
    counts = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(-1)
    is_image = batch["input_ids"] == model.config.image_token_id
    real = batch["attention_mask"].bool()
    image, text = (
        global_entropy_loss(logits, real & of, counts / counts.sum(), spread_over=4).item()
        for of in (is_image, ~is_image)
    )
    assert losses[0] - losses[1] == pytest.approx(2 * image + 0.5 * text, rel=1e-4)


@pytest.mark.parametrize("kind", [VLMoESFTTrainer, VLMoEDPOTrainer])
def test_the_coefficient_of_trls_arguments_replaces_that_of_the_model(
    kind: type[Trainer], make_trainer: Make, make_model: Model
) -> None:
    trainers = [
        make_trainer(kind, router_aux_loss_coef=0.0),
        make_trainer(kind, make_model(aux=0)),
        make_trainer(kind),
    ]
    for trainer in trainers:
        trainer.train()
    without, expected, with_balance_loss = [logged(trainer)[0] for trainer in trainers]
    assert without == expected < with_balance_loss - 0.1
    assert trainers[0].model.config.text_config.router_aux_loss_coef == 0


def test_an_sft_update_is_trainers_however_the_rows_are_split(
    make_trainer: Make, make_model: Model
) -> None:
    """Two steps of SGD, the rows in one micro-batch, in two and in four."""
    updates = []
    for kind, splits in [(Trainer, 1), *((VLMoESFTTrainer, splits) for splits in (1, 2, 4))]:
        trainer = make_trainer(
            kind,
            max_steps=2,
            per_device_train_batch_size=4 // splits,
            gradient_accumulation_steps=splits,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
        )
        trainer.train()
        updates.append(dict(trainer.model.named_parameters()))
    expected, *others = updates
    for name, initial in make_model().named_parameters():
        assert not initial.requires_grad or not torch.equal(initial, expected[name]), name
    for update in others:
        for name, values in update.items():
            torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_dpo_learns_preferences_that_only_the_image_decides(
    make_trainer: Make, make_image: Callable[..., Image.Image]
) -> None:
    """16 pairs with one question; which answer is chosen depends on the color of the picture."""

    def pair(number: int) -> dict[str, Any]:
        answers = ["red", "blue"] if number % 2 else ["blue", "red"]
        noise, plain = make_image(number), Image.new("RGB", (24, 20), answers[0])
        chosen, rejected = ([assistant(answer)] for answer in answers)
        images = [Image.blend(plain, noise, 0.2)]
        prompt = [user("what color?", 1)]
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "images": images}

    pairs = Dataset.from_list([pair(number) for number in range(16)])
    trainer = make_trainer(
        VLMoEDPOTrainer,
        options={"train_dataset": pairs, "eval_dataset": pairs},
        max_steps=60,
        per_device_train_batch_size=8,
    )
    assert trainer.evaluate()["eval_rewards/accuracies"] == 0  # the policy is the reference
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/accuracies"] == 1 and metrics["eval_rewards/margins"] > 0.5


@pytest.mark.parametrize("kind", [VLMoESFTTrainer, VLMoEDPOTrainer])
def test_a_row_longer_than_max_length_is_our_error(kind: type[Trainer], make_trainer: Make) -> None:
    trainer = make_trainer(kind, max_length=4, train_sampling_strategy="sequential")
    error = r"row 0 of the batch .*what color\?.* has \d+ tokens, more than max_length=4"
    with pytest.raises(ValueError, match=error):
        trainer.train()


def test_options_under_which_rows_are_no_samples_are_refused(
    make_trainer: Make, rows: Dataset
) -> None:
    text_only = rows.remove_columns("images").select([1])
    with pytest.raises(ValueError, match="router losses are per sample; set both to False"):
        make_trainer(
            VLMoESFTTrainer,
            options={"train_dataset": text_only, "eval_dataset": None},
            packing=True,
            max_length=16,
        )
    trainer = make_trainer(
        VLMoESFTTrainer, options={"train_dataset": text_only, "eval_dataset": None}
    )
    trainer.train()
    assert math.isfinite(logged(trainer)[0])


def test_without_trl_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vlmoe.training.trl_trainers")
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match="needs TRL: pip install trl"):
        import vlmoe.training.trl_trainers  # noqa: F401


@pytest.fixture
def warnings_of_foreign_losses(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], int]]:
    """How often it has been said that the router losses are missing; none is said already."""
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        yield lambda: sum(record.getMessage().startswith(WARNING) for record in caplog.records)


def sum_of_logits(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> Any:
    return outputs.logits.mean()


@pytest.mark.parametrize(
    ("kind", "fields", "options"),
    [
        (SFTTrainer, {}, {}),
        (DPOTrainer, {}, {}),
        (Trainer, {"label_smoothing_factor": 0.1}, {}),
        (Trainer, {}, {"compute_loss_func": sum_of_logits}),
    ],
)
def test_a_foreign_loss_is_warned_of_once(
    kind: type[Trainer],
    fields: dict[str, Any],
    options: dict[str, Any],
    make_trainer: Make,
    make_model: Model,
    warnings_of_foreign_losses: Callable[[], int],
) -> None:
    make_trainer(kind, make_model(0, 0), options, **fields).train()
    assert warnings_of_foreign_losses() == 0
    make_trainer(kind, make_model(0, Z_COEF), options, max_steps=2, **fields).train()
    assert warnings_of_foreign_losses() == 1


@pytest.mark.parametrize("kind", [Trainer, VLMoESFTTrainer, VLMoEDPOTrainer])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_our_own_losses_are_not_warned_of(
    kind: type[Trainer],
    checkpointing: bool,
    make_trainer: Make,
    warnings_of_foreign_losses: Callable[[], int],
) -> None:
    trainer = make_trainer(kind, gradient_checkpointing=checkpointing)
    trainer.train()
    trainer.evaluate()
    trainer.model.train()
    trainer.model.generate(torch.tensor([[7, 8]]), max_new_tokens=2)
    assert warnings_of_foreign_losses() == 0


@pytest.mark.parametrize("own_loop", [True, False])
def test_only_a_backward_pass_without_router_losses_is_warned_of(
    own_loop: bool, make_model: Model, warnings_of_foreign_losses: Callable[[], int]
) -> None:
    model = make_model().train()
    ids, weights = torch.tensor([[7, 8, 9]]), torch.ones(1)
    output = model(ids, output_router_logits=True)
    loss = output.logits.mean()
    if own_loop:
        losses = model.router_losses(output.router_logits, torch.ones_like(ids).bool(), weights)
        loss = losses.added_to(loss)
    assert warnings_of_foreign_losses() == 0
    loss.backward()
    assert warnings_of_foreign_losses() == (not own_loop)


@pytest.mark.slow
def test_the_warning_does_not_break_the_graph(make_model: Model) -> None:
    model = make_model().train()
    model.set_experts_implementation("batched_mm")
    forward = torch.compile(model, fullgraph=True, backend="eager")
    inputs = {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3).long()}
    torch.testing.assert_close(forward(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("kind", [VLMoESFTTrainer, VLMoEDPOTrainer])
def test_every_save_holds_our_model_card(
    kind: type[Trainer], make_trainer: Make, tmp_path: Path
) -> None:
    trainer = make_trainer(kind, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="from TRL")
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        assert MARKER in (folder / "README.md").read_text()
