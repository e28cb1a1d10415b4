"""Every Python snippet of README runs as it stands, on a CPU, where the text before it is true."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from datasets import Dataset
from PIL import Image

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor
from vlmoe.data.collator import VLMoECollator

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def turn(role: str, *content: Any) -> dict[str, Any]:
    parts = [each if isinstance(each, dict) else {"type": "text", "text": each} for each in content]
    return {"role": role, "content": parts}


@pytest.fixture
def namespace(
    saved_model: Path,
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
    make_image: Callable[..., Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    """What the text around the snippets names, in a folder that holds the models they name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "1")  # TRL reports each run to the Hub, except on CI
    for name in ("outputs/demo/model", "user/tiny-vlmoe"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(saved_model)
    tiny_model(text={"mlp_only_layers": [0, 1, 2]}).save_pretrained("user/dense-vlm")
    make_image().save("picture.png")
    model = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    processor = VLMoEProcessor.from_pretrained(saved_model)
    asked = turn("user", {"type": "image"}, "what color is the shape?")
    right, wrong = turn("assistant", "blue"), turn("assistant", "red")
    rows = [{"messages": [asked, right], "images": [make_image(n)]} for n in range(2)]
    pair = {"prompt": [asked], "chosen": [right], "rejected": [wrong], "images": [make_image()]}
    return {
        "model": model,
        "reference": copy.deepcopy(model),
        "processor": processor,
        "rows": Dataset.from_list(rows),
        "pairs": Dataset.from_list([pair, pair]),
    }


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs_as_it_stands(code: str, namespace: dict[str, Any]) -> None:
    if "accelerator" in code:
        plugin = GradientAccumulationPlugin(2, sync_with_dataloader=False)
        accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
        model = namespace["model"].train()
        optimizer = torch.optim.AdamW(model.parameters())
        model, optimizer = accelerator.prepare(model, optimizer)
        collate = VLMoECollator(namespace["processor"])
        step = [collate([row]) for row in namespace["rows"]]
        namespace |= {"accelerator": accelerator, "model": model, "optimizer": optimizer}
        namespace |= {"accumulate": len(step), "step": step}
    exec(code, namespace)
