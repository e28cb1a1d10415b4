# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Ask a saved model about images, or without any; the answer is printed as it is generated.

vlmoe generate --model outputs/tiny --image picture.png "What shape does the image contain?"
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .commands import run
from .config_file import ConfigFile
from .option_ranges import LEAST_TEMPERATURE
from .options import GenerateOptions, RuntimeOptions
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
    share,
    text,
)


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
    options = GenerateOptions(
        model=model,
        image=image,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=1.0 if top_p is None else top_p,
        seed=seed,
    )
    runtime = RuntimeOptions(device, dtype, attn_implementation, experts_implementation)
    generate(question, options, runtime)


def generate(question: str, options: GenerateOptions, runtime: RuntimeOptions) -> str:
    """Print the answer token by token, and return it.

    Raises:
        ValueError: an option, the model or an image is not usable.
        FileNotFoundError: a file or folder does not exist.
    """
    source, system = str(options.model), options.system
    paths = options.image or []
    for path in paths:
        if not Path(path).expanduser().is_file():
            raise FileNotFoundError(f"There is no image file {path}.")
    import torch
    from transformers import TextStreamer, set_seed

    from vlmoe.data.images import open_image
    from vlmoe.data.long_rows import require_room
    from vlmoe.hub.finite_outputs import finite_logits

    from .loading import model_for_answers

    model, processor = model_for_answers(source, runtime)
    limits = processor.image_limits
    images = [open_image(Path(path).expanduser(), path, limits=limits) for path in paths]
    set_seed(options.seed)
    inputs = prompt_inputs(processor, question, images, system).to(model.device)
    require_room(model, inputs["input_ids"].shape[1], options.max_new_tokens)
    tokenizer = processor.tokenizer
    with torch.inference_mode():
        tokens = model.generate(
            **inputs,
            **sampling(options),
            max_new_tokens=options.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            logits_processor=finite_logits(model, inputs),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def prompt_inputs(
    processor: Any, question: str, images: list[Any], system: str | None = None
) -> Any:
    """The model's inputs for a question about images."""
    from vlmoe.hub.input_errors import reading

    with reading("The question, by the model's processor and chat template", keep=(ValueError,)):
        return processor.apply_chat_template(
            conversation(question, images, system),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )


def conversation(question: str, images: list[Any], system: str | None) -> list[dict[str, Any]]:
    """The messages of a question: the images first, then the text."""
    parts = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def sampling(options: GenerateOptions) -> dict[str, Any]:
    """Arguments of `generate` for greedy decoding, or for sampling at a temperature."""
    if options.temperature == 0:
        return {"do_sample": False, "num_beams": 1}
    return {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}


if __name__ == "__main__":
    sys.exit(run("generate", main))
