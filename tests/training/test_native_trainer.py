"""`VLMoETrainer` on transformers' own sparse models: train on pictures, evaluate, save, resume."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assistant, picture, row, user
from native_processors import tiny_processor
from safetensors import safe_open
from sparse_families import sparse_family
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from vlmoe import RouterBiasCallback, VLMoETrainer
from vlmoe.training.sparse_loss import SparseLoss
from vlmoe.training.telemetry import TELEMETRY_FILE, read_telemetry

FAST = ("qwen3_vl_moe", "llava_qwen3_moe", "mixtral")
SLOW = ("qwen3_5_moe", "glm4v_moe", "gemma4", "internvl_qwen3_moe")
FAMILIES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
SHORT = {
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 3,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def rows(family: str) -> list[dict[str, Any]]:
    """Two rows with pictures, one of text alone; for a language model text alone."""
    plain = [row(user(f"say {word}"), assistant(word)) for word in ("one", "two")]
    if family == "mixtral":
        return plain
    shown = [
        row(user("color?", 1), assistant(("red", "blue")[i]), images=[picture(i)]) for i in range(2)
    ]
    return [*shown, plain[0]]


def trainer_of(family: str, output: Path, **values: Any) -> VLMoETrainer:
    return VLMoETrainer(
        sparse_family(family),
        SHORT | {"output_dir": str(output)} | values,
        train_dataset=rows(family),
        eval_dataset=rows(family)[:2],
        processing_class=tiny_processor(family),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_native_model_is_trained_saved_and_loads_plainly(family: str, tmp_path: Path) -> None:
    trainer = trainer_of(family, tmp_path)
    assert isinstance(trainer.compute_loss_func, SparseLoss)
    losses = [e["loss"] for e in (trainer.train(), trainer.state.log_history)[1] if "loss" in e]
    assert losses[-1] < losses[0]
    telemetry = read_telemetry(tmp_path / TELEMETRY_FILE)
    assert [entry["step"] for entry in telemetry] == [1, 2, 3, 4, 5]
    seen = telemetry[0]["tokens"]
    assert seen["text"][0] > 0 and (seen["image"][0] > 0 or family == "mixtral")
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0 and 0 <= metrics["eval_exact_match"] <= 1
    trainer.save_model()
    auto = AutoModelForCausalLM if family == "mixtral" else AutoModelForImageTextToText
    loaded = auto.from_pretrained(tmp_path)
    own = trainer.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.state_dict().items())
    assert (tmp_path / "chat_template.jinja").is_file()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_ends_with_the_same_weights(family: str, tmp_path: Path) -> None:
    whole = trainer_of(family, tmp_path)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-5")
    resumed = trainer_of(family, tmp_path)
    torch.nn.init.zeros_(resumed.model.get_input_embeddings().weight)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    own = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, own[name]), name


def test_qwen3_vl_moe_is_saved_in_the_published_layout(tmp_path: Path) -> None:
    trainer = trainer_of("qwen3_vl_moe", tmp_path, max_steps=1, save_steps=1)
    trainer.train()
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    with safe_open(tmp_path / "checkpoint-1" / "model.safetensors", "pt") as weights:
        saved = weights.get_tensor(name)
    assert torch.equal(saved.mT, trainer.model.state_dict()[name])


def test_a_dense_model_is_trained_by_its_own_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = VLMoETrainer(
        sparse_family("llava_dense"),
        SHORT | {"output_dir": str(tmp_path), "max_steps": 1},
        train_dataset=rows("llava_dense"),
        processing_class=tiny_processor("llava_dense"),
    )
    assert trainer.compute_loss_func is None and "trained by its own loss" in caplog.text
    assert trainer.train().global_step == 1


def test_long_rows_are_left_out_or_refused(tmp_path: Path) -> None:
    def train(**values: Any) -> VLMoETrainer:
        return VLMoETrainer(
            sparse_family("llava_qwen3_moe"),
            SHORT | {"output_dir": str(tmp_path)},
            train_dataset=[*rows("llava"), row(user("long " * 20), assistant("yes"))],
            processing_class=tiny_processor("llava"),
            max_length=80,
            **values,
        )

    assert len(train(on_long_rows="drop").train_dataset) == 3
    with pytest.raises(ValueError, match=r"has .* tokens, more than max_length=80"):
        train().train()
    with pytest.raises(ValueError, match=r"'cut'; allowed: error, drop, shorten-prompt"):
        train(on_long_rows="cut")
    assert train(on_long_rows="shorten-prompt").train().global_step == SHORT["max_steps"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_router_logits_that_are_not_finite_stop_a_run_before_the_step(
    tmp_path: Path, accumulation: int
) -> None:
    trainer = trainer_of(
        "mixtral", tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=accumulation
    )
    router = trainer.model.model.layers[1].mlp.gate
    kept = trainer.model.state_dict()["lm_head.weight"].clone()
    calls = []

    def spoil(module: Any, args: Any, output: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        calls.append(0)
        bad = torch.full_like(output[0], torch.inf)
        return (bad if len(calls) == 1 else output[0], *output[1:])

    router.register_forward_hook(spoil)
    trainer.compute_loss_func = None
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.experts are NaN or infinite in step 1 "
    ):
        trainer.train()
    assert torch.equal(kept, trainer.model.state_dict()["lm_head.weight"])


@pytest.mark.parametrize("rate", [None, 0.5])
def test_selection_biases_are_moved_where_the_family_has_them(
    tmp_path: Path, rate: float | None
) -> None:
    given = [] if rate is None else [RouterBiasCallback(rate)]
    trainer = VLMoETrainer(
        sparse_family("glm4v_moe"),
        SHORT | {"output_dir": str(tmp_path), "max_steps": 1, "save_strategy": "no"},
        train_dataset=rows("glm4v_moe"),
        processing_class=tiny_processor("glm4v_moe"),
        callbacks=given,
    )
    trainer.train()
    biases = [b for n, b in trainer.model.named_buffers() if n.endswith("e_score_correction_bias")]
    step = rate or 0.001
    moved = torch.cat(biases).abs()
    assert ((moved == 0) | (moved - step).abs().lt(1e-6)).all() and moved.any()
