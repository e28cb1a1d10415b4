"""What runs in a process whose Hub is the test's own: called through the fixture `hub_process`.

`huggingface_hub` reads HF_ENDPOINT when it is imported, so that the process of pytest cannot talk
to the server. Nothing of vlmoe is imported at the top: `without_vlmoe` must come before.
"""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROMPT = "what color is the shape?"


@contextlib.contextmanager
def process(environment: dict[str, str], start: Callable[[], None]) -> Iterator[Callable[..., Any]]:
    """`call(function, *arguments)`: its result in one other process, which `start` begins."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start)
        pool.submit(bool).result()
    with pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def with_vlmoe() -> None:
    """Start a process of somebody who has the package."""
    import torch

    import vlmoe  # noqa: F401

    torch.set_num_threads(1)


def without_vlmoe() -> None:
    """Start a process of somebody who has not."""
    import torch

    sys.modules.update({"vlmoe": None, "vlmoe_cli": None})  # type: ignore[dict-item]
    torch.set_num_threads(1)


def command(*argv: str) -> tuple[int, str, str]:
    """Run `vlmoe ...`: exit code, stdout and stderr."""
    from vlmoe_cli.main import main

    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        code = main(list(argv))
    return code, out.getvalue(), error.getvalue()


def logits(source: str | Path, revision: str = "main", **arguments: Any) -> np.ndarray:
    """Logits of a saved or pushed model, (1, length, vocabulary), for one image and a question."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    arguments |= {"revision": revision}
    model = AutoModelForImageTextToText.from_pretrained(source, **arguments).eval()
    processor = AutoProcessor.from_pretrained(source, **arguments)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    content = [
        {"type": "image", "image": Image.fromarray(pixels)},
        {"type": "text", "text": PROMPT},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        return model(**inputs).logits.numpy()


def logits_of_class(source: str, auto_class: str) -> np.ndarray:
    """Logits of four tokens, by an Auto class of transformers; without remote code."""
    import torch
    import transformers

    model = getattr(transformers, auto_class).from_pretrained(source).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([[20, 30, 40, 50]])).logits.numpy()
