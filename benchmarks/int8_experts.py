# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""What int8 experts change: their bytes, and the logits beside what bf16 rounding alone changes.

    OMP_NUM_THREADS=1 python benchmarks/int8_experts.py outputs/demo/model

Logits of test questions of easy-VQA, position by position, relative to the largest logit. A token
is rerouted if in some layer it is sent to other experts than before; its logits then differ by what
the experts differ, however small the error that tipped the choice.
"""

import argparse
from typing import Any

import torch
from measure import write_result

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor, expert_int8_config
from vlmoe.data.collator import VLMoECollator
from vlmoe.data.loading import load_rows

IMAGES = 32
PAIRS = (
    ("bf16", "fp32"),
    ("int8 experts, rest bf16", "bf16"),
    ("int8 experts, rest bf16", "fp32"),
    ("int8 experts, rest fp32", "fp32"),
)


def answer(folder: str, batch: dict[str, torch.Tensor], dtype: torch.dtype, int8: bool) -> Any:
    """Logits (tokens, vocab), chosen experts (layers, tokens, k), bytes of the experts."""
    quantization = {"quantization_config": expert_int8_config()} if int8 else {}
    model = VLMoEForConditionalGeneration.from_pretrained(folder, dtype=dtype, **quantization)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        output = model(**batch, output_router_logits=True)
    k = model.config.text_config.num_experts_per_tok
    mask = batch["attention_mask"].bool()
    chosen = [logits.topk(k).indices.sort(-1).values for logits in output.router_logits]
    size = sum(
        part.nbytes
        for name, parameter in model.named_parameters()
        if ".experts." in name
        for part in storages(parameter.data)
    )
    return output.logits.float()[mask], torch.stack(chosen)[:, mask.flatten()], size


def storages(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors behind a parameter."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [
        inner
        for name in tensor.__tensor_flatten__()[0]
        for inner in storages(getattr(tensor, name))
    ]


def compare(ours: Any, reference: Any) -> dict[str, float]:
    """Shares and largest differences over all tokens."""
    difference = (ours[0] - reference[0]).abs().amax(-1) / reference[0].abs().max()
    kept = (ours[1] == reference[1]).all(-1).all(0)
    same = ours[0].argmax(-1) == reference[0].argmax(-1)
    return {
        "rerouted tokens": (~kept).float().mean().item(),
        "largest difference, others": difference[kept].max().item(),
        "largest difference, all": difference.max().item(),
        "tokens within 2%": (difference <= 0.02).float().mean().item(),
        "same most likely token": same.float().mean().item(),
    }


def main() -> None:
    """Measure, print the table, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a model trained by `make demo`")
    folder = parser.parse_args().model
    torch.set_num_threads(1)
    collate = VLMoECollator(VLMoEProcessor.from_pretrained(folder))
    batch = collate(list(load_rows("easy_vqa", "test", limit=IMAGES)))
    del batch["labels"]
    runs = {
        "fp32": answer(folder, batch, torch.float32, int8=False),
        "bf16": answer(folder, batch, torch.bfloat16, int8=False),
        "int8 experts, rest fp32": answer(folder, batch, torch.float32, int8=True),
        "int8 experts, rest bf16": answer(folder, batch, torch.bfloat16, int8=True),
    }
    table = {f"{a} against {b}": compare(runs[a], runs[b]) for a, b in PAIRS}
    print(f"{'':34}" + "".join(f"{name:>28}" for name in next(iter(table.values()))))
    for name, row in table.items():
        print(f"{name:34}" + "".join(f"{value:28.2%}" for value in row.values()))
    ratio = runs["int8 experts, rest bf16"][2] / runs["bf16"][2]
    print(f"Bytes of the experts, int8 / bf16: {ratio:.4f}")
    tokens = int(batch["attention_mask"].sum())
    write_result("int8_experts", {"tokens": tokens, "bytes int8 / bf16": ratio, "cases": table})


if __name__ == "__main__":
    main()
