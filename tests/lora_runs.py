"""Models with LoRA on experts, and what one pass or a short training of them gives."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

Tensors = dict[str, torch.Tensor]

MODELS = [
    "VLMoEForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen3MoeForCausalLM",
    "OlmoeForCausalLM",
    "MixtralForCausalLM",
    "GptOssForCausalLM",
]
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
LAYERS = 3  # sparse layers of a tiny model
RELATIVE = 1e-5
INPUT_IDS = torch.tensor([[7, 8, 9, 10, 11, 12, 13], [14, 15, 7, 16, 17, 18, 19]])


def lora(targets: list[str] = BOTH, **fields: Any) -> LoraConfig:
    return LoraConfig(
        target_modules=[], target_parameters=targets, task_type="CAUSAL_LM", **{"r": 3} | fields
    )


def randomize(model: torch.nn.Module, adapter: str = "default", seed: int = 1) -> None:
    """B starts at zero, and would hide everything."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}." in name:
            parameter.data.normal_(std=0.5, generator=generator)


def run(model: torch.nn.Module, ids: torch.Tensor = INPUT_IDS, forward: Any = None) -> Tensors:
    """Compute logits, and the gradients of what is trained, through `forward` (of the model)."""
    model.zero_grad()
    forward = model if forward is None else forward
    logits = forward(input_ids=ids, use_cache=False).logits
    if logits.requires_grad:
        (logits.float() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | grads


def assert_close(ours: Tensors, reference: Tensors, relative: float = RELATIVE) -> None:
    assert ours.keys() == reference.keys()
    for name, tensor in reference.items():
        assert tensor.norm() > 0 or "lora_" in name
        assert (ours[name] - tensor).norm() <= relative * tensor.norm(), name


def train(
    model: torch.nn.Module, kind: str, sentences: Dataset, folder: Path, tokenizer: Any
) -> list[float]:
    """Losses of three optimizer steps."""
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    if kind == "TRL":
        from trl import SFTConfig, SFTTrainer

        rows = sentences.remove_columns("labels")
        trainer: Trainer = SFTTrainer(
            model=model, args=SFTConfig(**common), train_dataset=rows, processing_class=tokenizer
        )
    else:
        from transformers import DataCollatorForSeq2Seq

        collate = DataCollatorForSeq2Seq(tokenizer)
        args = TrainingArguments(**common)
        trainer = Trainer(model=model, args=args, train_dataset=sentences, data_collator=collate)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
