# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Ask a saved model about images, or without any; the answer is printed as it is generated.

vlmoe generate --model outputs/tiny --image picture.png "What shape does the image contain?"
"""

import sys
from typing import Annotated

import typer

from .commands import run
from .config_file import ConfigFile
from .shared_options import (
    AnswerTokens,
    Attention,
    Device,
    Dtype,
    ExpertKernels,
    Pictures,
    SavedModel,
    Seed,
    refuse_unread,
    require_files,
    share,
    text,
)

LEAST_TEMPERATURE = 1e-4  # logits divided by a far smaller one are infinite


def temperature(text: str) -> float:
    """Return a temperature that logits can be divided by, or 0; raise `ValueError` for another."""
    value = float(text)
    if value != 0 and not LEAST_TEMPERATURE <= value <= 100:
        raise ValueError(f"must be 0 (the most likely token), or {LEAST_TEMPERATURE:g} to 100")
    return value


def main(
    question: Annotated[str, typer.Argument(parser=text, help="What to ask.")],
    model: SavedModel,
    image: Pictures = None,
    system: Annotated[str | None, typer.Option(parser=text, help="A system message.")] = None,
    max_new_tokens: AnswerTokens = 64,
    temperature: Annotated[
        float,
        typer.Option(parser=temperature, help="Sample at this temperature; 0 decodes greedily."),
    ] = 0,
    top_p: Annotated[
        float | None,
        typer.Option(
            parser=share,
            help="Sample from the smallest set of tokens whose probabilities sum to this share.",
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    attn_implementation: Attention = None,
    experts_implementation: ExpertKernels = None,
    config: ConfigFile = None,
) -> None:
    """Ask a model a question about images, or a question alone.

    The answer is printed token by token.

    examples:
      vlmoe generate --model outputs/tiny --image picture.png "What shape does the image contain?"
      vlmoe generate --model outputs/tiny --image a.png --image b.png "What is the difference?"
      vlmoe generate --model outputs/tiny --temperature 0.7 --seed 3 "Is a teal shape red?"
    """
    if temperature == 0:
        refuse_unread("give --temperature above 0", top_p=top_p is not None)
    require_files(image)
    from transformers import TextStreamer

    from vlmoe import answer
    from vlmoe.data.native_chat import tokenizer_of
    from vlmoe.training.build import Runtime, model_for_answers

    runtime = Runtime(device, dtype, attn_implementation, experts_implementation)
    network, processor = model_for_answers(model, runtime)
    answer(
        network,
        processor,
        image,
        question,
        max_new_tokens=max_new_tokens,
        system=system,
        temperature=temperature,
        top_p=1.0 if top_p is None else top_p,
        seed=seed,
        streamer=TextStreamer(tokenizer_of(processor), skip_prompt=True, skip_special_tokens=True),
    )


if __name__ == "__main__":
    sys.exit(run("generate", main))
