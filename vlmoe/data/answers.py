# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Questions to a model: one about images, or a batch of prompts, answered by `generate`."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import LogitsProcessor, PreTrainedTokenizerBase, set_seed

from ..hub.finite_outputs import finite_logits
from ..hub.input_errors import reading
from ..hub.saved_model import Processor, is_own_processor
from ..processing.image_sources import DEFAULT_LIMITS, ImageLimits
from .conversations import IMAGE, Turn
from .images import open_image
from .long_rows import require_room
from .native_chat import Chat, NativeChatEncoder, tokenizer_of

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer

Picture = str | os.PathLike[str] | Image.Image
"""An image file, or an opened image."""


def answer(
    model: "PreTrainedModel",
    processor: Processor,
    image: Picture | Sequence[Picture] | None,
    question: str,
    *,
    max_new_tokens: int = 64,
    system: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    streamer: "BaseStreamer | None" = None,
) -> str:
    """Ask a model one question about an image, about several, or about none.

    Args:
        model: on any device; it answers in evaluation mode and keeps the mode it was in.
        processor: the model's; of a language model its tokenizer.
        image: image files or PIL images, in the order in which the model sees them; or None.
        question: what to ask.
        max_new_tokens: the longest answer, in tokens.
        system: a system message.
        temperature: 0 decodes greedily; above 0 tokens are sampled.
        top_p: when sampling, the share of probability that the likeliest tokens must hold.
        seed: sets all random generators before sampling.
        streamer: receives the tokens as they are generated.

    Returns:
        The answer, without special tokens and surrounding white space.

    Raises:
        FileNotFoundError: an image file does not exist.
        ValueError: an image cannot be used, the prompt and answer are longer than the model's
            positions, or the model's outputs are NaN or infinite.
    """
    images, tokenizer = open_images(image, processor), tokenizer_of(processor)
    if seed is not None:
        set_seed(seed)
    inputs = prompt_inputs(processor, question, images, system).to(model.device)
    length = inputs["input_ids"].shape[1]
    require_room(model, length, max_new_tokens)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature
        else {"do_sample": False, "num_beams": 1}
    )
    with evaluation_mode(model), torch.inference_mode():
        sequences = model.generate(
            **inputs,
            **sampling,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=end_tokens(model, tokenizer),
            logits_processor=finite_logits(model, inputs),
            streamer=streamer,
        )
    return tokenizer.decode(sequences[0, length:], skip_special_tokens=True).strip()


def open_images(
    images: Picture | Sequence[Picture] | None,
    processor: Processor,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> list[Image.Image]:
    """Open images as RGB, within the limits of the processor, or if it has none, those given.

    Raises as `answer` does.
    """
    given = [] if images is None else images
    limits = getattr(processor, "image_limits", limits)
    if isinstance(given, str | os.PathLike | Image.Image):
        given = [given]
    opened = []
    for number, image in enumerate(given):
        if isinstance(image, str | os.PathLike):
            path = Path(image).expanduser()
            if not path.is_file():
                raise FileNotFoundError(f"There is no image file {image}.")
            opened.append(open_image(path, str(image), limits=limits))
        else:
            opened.append(open_image(image, f"image {number}", limits=limits))
    return opened


def prompt_inputs(
    processor: Processor,
    question: str,
    images: Sequence[Image.Image],
    system: str | None = None,
) -> "BatchFeature":
    """Encode a question about images as a prompt for an answer.

    Raises:
        ValueError: the chat template or the processor refuses it, or the model takes no images.
    """
    if not is_own_processor(processor):
        if images and processor is tokenizer_of(processor):
            raise ValueError("The question has images, but the model reads text alone.")
        asked = Turn("user", (*(IMAGE for _ in images), question))
        conversation = (Turn("system", (system,)), asked) if system else (asked,)
        chat = Chat(conversation, images, "The question")
        return NativeChatEncoder(processor)([chat], side="left", generation_prompt=True)[0]
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    with reading("The question, by the model's processor and chat template", keep=(ValueError,)):
        return processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )


def greedy_answers(
    model: "PreTrainedModel",
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, torch.Tensor],
    max_new_tokens: int,
    certainty: "TokenCertainty | None" = None,
) -> torch.Tensor:
    """Generate (batch, new tokens) greedily: the answers with their end and padding tokens.

    Args:
        model: in evaluation mode.
        tokenizer: of the model.
        inputs: the prompts, padded on the left.
        max_new_tokens: the longest answer.
        certainty: records how likely each token was.

    Raises:
        ValueError: the logits are NaN or infinite; the message names the layer.
    """
    processors = finite_logits(model, inputs)
    if certainty is not None:
        processors.append(certainty)
    sequences = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(model, tokenizer),
        logits_processor=processors,
    )
    return sequences[:, inputs["input_ids"].shape[1] :]


class TokenCertainty(LogitsProcessor):
    """Record the log-probability of each token that greedy decoding takes, the likeliest one.

    `generate(output_scores=True)` would keep (batch, vocabulary) numbers for each new token.
    """

    def __init__(self) -> None:
        self._steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores as they are."""
        scores32 = scores.float()
        self._steps.append(scores32.amax(-1) - scores32.logsumexp(-1))
        return scores

    def log_probabilities(self) -> torch.Tensor:
        """Return (batch, new tokens); numbers after the end of an answer mean nothing."""
        return torch.stack(self._steps, dim=1)


def end_tokens(model: "PreTrainedModel", tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, and those of the model's own config.

    Gemma's tokenizer names the end of a text, its generation config the end of a turn, too.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    given = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in given if token is not None))


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Hold a model in evaluation mode for the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
