"""With k = 1 the router learns from the task, or a warning says that it does not."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from builders import assistant, picture, row, user
from transformers import Trainer, TrainingArguments

from vlmoe import VLMoEForConditionalGeneration, VLMoETrainer
from vlmoe.data.collator import VLMoECollator
from vlmoe.modeling_vlmoe import router as routers
from vlmoe.processing.processing_vlmoe import VLMoEProcessor

ONE = {"num_experts_per_tok": 1, "router_aux_loss_coef": 0.0}
EVERYWHERE = {
    "vision_num_experts": 4,
    "vision_num_experts_per_tok": 1,
    "projector_num_experts": 4,
    "projector_num_experts_per_tok": 1,
}
VISION_TRUE = {"vision_norm_topk_prob": True, "projector_norm_topk_prob": True}
BANKS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"scoring_func": "sigmoid"},
    "shared expert": {"num_shared_experts": 1},
    "experts by modality": {"modality_experts": {"text": [0, 1], "image": [2, 3]}},
    "groups": {"n_group": 2, "topk_group": 1},
}


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The warnings of routers, once for each call."""
    messages: list[str] = []
    monkeypatch.setattr(routers.logger, "warning_once", messages.append)
    yield messages


def router_gradients(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """The gradient of the task's loss on each router, by name, relative to that of its experts."""
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    routed = [name.removesuffix("router.weight") for name in grads if "router.weight" in name]
    return {
        name: float(grads[f"{name}router.weight"].norm() / grads[f"{name}experts.down_proj"].norm())
        for name in routed
    }


@pytest.mark.parametrize("kind", BANKS)
def test_the_task_trains_the_routers_of_one_expert_unless_they_normalize(
    kind: str, tiny_model: Callable[..., Any], tiny_batch: Callable[..., Any], warned: list[str]
) -> None:
    model = tiny_model(text=ONE | BANKS[kind], **EVERYWHERE)
    inputs = tiny_batch(model.config, ["..ab.", ".c....", "......."])
    gradients = router_gradients(model, inputs)
    assert len(gradients) == 3 + 2 + 1 and min(gradients.values()) > 1e-3
    assert not warned

    text = ONE | BANKS[kind] | {"norm_topk_prob": True}
    normalized = tiny_model(text=text, **EVERYWHERE, **VISION_TRUE)
    gradients = router_gradients(normalized, inputs)
    assert len(gradients) == 3 + 2 + 1 and max(gradients.values()) < 1e-6
    assert len(warned) == 3 + 2 + 1 and "`norm_topk_prob=False`" in warned[0]


def test_one_expert_is_scaled_by_its_score_or_not_at_all(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(text=ONE)
    block = model.model.language_model.layers[0].mlp
    hidden = torch.randn(1, 7, block.router.weight.shape[1])
    scores, index = (hidden[0] @ block.router.weight.T).softmax(-1).max(-1)
    scaled = block(hidden)[0]
    model.config.text_config.norm_topk_prob = True
    plain = block(hidden)[0]
    torch.testing.assert_close(scaled, plain * scores[:, None])
    one = block.experts(hidden[0], index[:, None], torch.ones(7, 1))
    torch.testing.assert_close(plain[0], one)


def test_the_warning_is_for_routers_that_train_and_choose(
    tiny_model: Callable[..., Any], tiny_batch: Callable[..., Any], warned: list[str]
) -> None:
    text = ONE | {"norm_topk_prob": True}
    model = tiny_model(text=text)
    inputs = tiny_batch(model.config, ["......."])
    model(**inputs)
    with torch.no_grad():
        model.train()(**inputs)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("router" not in name)
    model(**inputs)
    tiny_model(text=text | {"num_experts": 1}).train()(**inputs)
    tiny_model(text=text | {"num_experts_per_tok": 2}).train()(**inputs)
    assert not warned


@pytest.mark.parametrize("trainer_class", [Trainer, VLMoETrainer])
def test_training_warns_once_with_plain_trainer_and_ours(
    trainer_class: type[Trainer],
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
    processor: VLMoEProcessor,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(routers.logger, "warning", messages.append)
    routers.logger.warning_once.cache_clear()
    arguments = {"max_steps": 2, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    arguments |= {"output_dir": str(tmp_path), "disable_tqdm": True}
    shown = [row(user("color?", 1), assistant("blue"), images=[picture(i)]) for i in range(4)]
    given: dict[str, Any] = {"train_dataset": shown, "processing_class": processor}
    if trainer_class is Trainer:
        collator = VLMoECollator(processor)
        given["args"] = TrainingArguments(**arguments, remove_unused_columns=False)
        given["data_collator"] = collator
    else:
        given["args"] = arguments
    text = {"num_experts_per_tok": 1, "vocab_size": len(processor.tokenizer)}
    trainer_class(tiny_model(text=text | {"norm_topk_prob": True}), **given).train()
    assert sum("k = 1" in message for message in messages) == 1
