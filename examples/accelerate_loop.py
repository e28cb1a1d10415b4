# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""An epoch on Accelerate alone, with the gradients of Trainer; steps that are not full are dropped.

accelerate launch examples/accelerate_loop.py MODEL_FOLDER DATASET OUTPUT_FOLDER
"""

import sys
from typing import Any

import accelerate
import torch

from vlmoe import VLMoECollator, VLMoEForConditionalGeneration, VLMoEProcessor, load_rows


def train(model: Any, optimizer: Any, loader: Any, accumulate: int, output_dir: str) -> None:
    """Sum the gradients of `accumulate` batches, which share the count of their label tokens."""
    plugin = accelerate.utils.GradientAccumulationPlugin(accumulate, sync_with_dataloader=False)
    accelerator = accelerate.Accelerator(gradient_accumulation_plugin=plugin)
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
    for step in zip(*[iter(loader)] * accumulate, strict=False):
        num_items = accelerator.reduce(sum((b["labels"][:, 1:] != -100).sum() for b in step))
        for batch in step:
            with accelerator.accumulate(model):  # averages over batches and ranks: undone below
                loss = model(**batch, num_items_in_batch=num_items).loss
                accelerator.backward(loss * accumulate * accelerator.num_processes)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    accelerator.save_state(output_dir)


if __name__ == "__main__":
    model_folder, dataset, output_dir = sys.argv[1:]
    model = VLMoEForConditionalGeneration.from_pretrained(model_folder)
    collate = VLMoECollator(VLMoEProcessor.from_pretrained(model_folder))
    loader = torch.utils.data.DataLoader(load_rows(dataset), 4, shuffle=True, collate_fn=collate)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader, 2, output_dir)
