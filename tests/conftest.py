"""Fixtures of all tests."""

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import assistant, picture, user
from hub_process import process, with_vlmoe, without_vlmoe
from hub_server import WRITER, HubServer
from PIL import Image
from tiny_sizes import TEXT, VISION, VOCABULARY
from torch._dynamo.utils import counters
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vlmoe import VLMoEConfig, VLMoEForConditionalGeneration
from vlmoe.data.tokenizer import train_tokenizer
from vlmoe.processing.processing_vlmoe import VLMoEProcessor

TOP = {"image_token_id": 5, "pixel_shuffle_factor": 2}
TEXTS = ["what color is the shape? blue", "what shape is it? a circle", "is it red? yes, no"] * 3


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors: more threads only cost time."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., VLMoEConfig]:
    """`tiny_config(text={...}, vision={...}, **top)`: tiny sizes, some fields replaced."""

    def make(
        text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **top: Any
    ) -> VLMoEConfig:
        vision = {"model_type": "siglip_vision_model"} | VISION | (vision or {})
        if vision["model_type"] == "siglip_vision_model":
            vision = {"vision_use_head": False} | vision
        return VLMoEConfig(text_config=TEXT | (text or {}), vision_config=vision, **TOP | top)

    return make


@pytest.fixture(scope="session")
def tiny_model(
    tiny_config: Callable[..., VLMoEConfig],
) -> Callable[..., VLMoEForConditionalGeneration]:
    """`tiny_model(config)` or `tiny_model(text={...}, **top)`: seeded, in eval mode."""

    def make(
        config: VLMoEConfig | None = None, seed: int = 0, **fields: Any
    ) -> VLMoEForConditionalGeneration:
        torch.manual_seed(seed)
        return VLMoEForConditionalGeneration(config or tiny_config(**fields)).eval()

    return make


@pytest.fixture(scope="session")
def tiny_moe(tiny_model: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """`tiny_moe("OlmoeForCausalLM", **fields)`: a sparse model of the library, or ours, in eval."""

    def make(name: str, implementation: str = "grouped_mm", **fields: Any) -> PreTrainedModel:
        if name == "VLMoEForConditionalGeneration":
            model = tiny_model(text=fields)
        else:
            torch.manual_seed(0)
            own = {"num_local_experts": TEXT["num_experts"], "head_dim": 8} | fields
            if name in ("MixtralForCausalLM", "OlmoeForCausalLM", "GptOssForCausalLM"):
                own["intermediate_size"] = TEXT["moe_intermediate_size"]
            config: Any = TEXT | own
            if name.startswith("Qwen3VLMoe"):
                rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
                vision = {"depth": 1, "num_heads": 4, "out_hidden_size": TEXT["hidden_size"]}
                vision |= VISION | {"deepstack_visual_indexes": [0]}
                config = {"text_config": config | {"rope_parameters": rope}}
                config |= {"vision_config": vision}
            model_class = getattr(transformers, name)
            model = model_class(model_class.config_class(**config)).eval()
        model.set_experts_implementation(implementation)
        return model

    return make


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with the special tokens of the chat format."""
    return train_tokenizer(TEXTS, vocab_size=VOCABULARY)


@pytest.fixture(scope="session")
def processor(
    tiny_config: Callable[..., VLMoEConfig], tokenizer: PreTrainedTokenizerBase
) -> VLMoEProcessor:
    """The processor of `tiny_config()`: fixed resolution; up to 4 x 4 tiles where a call tiles."""
    return VLMoEProcessor.for_config(tiny_config(), tokenizer)


@pytest.fixture(scope="session")
def make_image() -> Callable[..., Image.Image]:
    """`make_image(seed, size=(width, height), mode="RGB")`: an image of random pixels."""

    return picture


@pytest.fixture(scope="session")
def data_folder(
    tmp_path_factory: pytest.TempPathFactory, make_image: Callable[..., Image.Image]
) -> Path:
    """A folder with `train.jsonl` (10 images, 2 questions each) and `test.jsonl` (3 images)."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 10), ("test", 3)):
        rows = []
        for number in range(count):
            name = f"{split}_{number}.png"
            make_image(len(split) * 100 + number).save(folder / name)
            pairs = [
                ("what color is the shape?", "blue"),
                ("is it red?", ("yes", "no")[number % 2]),
            ]
            rows.append(
                {
                    "messages": [[user(asked, 1), assistant(said)] for asked, said in pairs],
                    "images": [name],
                    "question_type": ["color", "yes/no"],
                }
            )
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


@pytest.fixture(scope="session")
def saved_model(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    """A folder with a tiny model (with dropout, for training) and the processor that fits it."""
    folder = tmp_path_factory.mktemp("model")
    text = {
        "vocab_size": VOCABULARY,
        "attention_dropout": 0.1,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = tiny_model(text=text, vision={"attention_dropout": 0.1})
    model.save_pretrained(folder)
    VLMoEProcessor.for_config(model.config, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def seq(processor) -> str:
    """The image tokens of one tile."""
    return "<image>" * processor.image_seq_len


@pytest.fixture(scope="session")
def with_tokens(
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[Iterable[str]], PreTrainedTokenizerBase]:
    """`with_tokens(tokens)`: the tokenizer with further special tokens."""

    def make(tokens: Iterable[str] = ()) -> PreTrainedTokenizerBase:
        copied = copy.deepcopy(tokenizer)
        copied.add_tokens(list(tokens), special_tokens=True)
        return copied

    return make


@pytest.fixture(scope="module")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
    processor: VLMoEProcessor,
) -> Path:
    """A model with both router losses, and its processor."""
    folder = tmp_path_factory.mktemp("model")
    text = {"router_aux_loss_coef": 1.0, "router_z_loss_coef": 1.0}
    tiny_model(text=text | {"vocab_size": len(processor.tokenizer)}).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No graphs and counts of other tests."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def hub_server() -> Iterator[HubServer]:
    """A Hub on the loopback interface; see `hub`."""
    with HubServer() as server:
        yield server


@pytest.fixture
def hub(hub_server: HubServer) -> HubServer:
    """An empty Hub."""
    hub_server.reset()
    return hub_server


@pytest.fixture(scope="session")
def hub_environment(
    hub_server: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What tells a new process to use `hub`, logged in as a user who may write."""
    return {
        "HF_ENDPOINT": hub_server.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": WRITER,
        "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
    }


@pytest.fixture(scope="session")
def hub_process(hub_environment: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """`hub_process(function, *arguments)`: its result in a process whose Hub is `hub`."""
    with process(hub_environment, with_vlmoe) as call:
        yield call


@pytest.fixture(scope="session")
def hub_process_without_vlmoe(hub_environment: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """The same in a process that cannot import vlmoe."""
    with process(hub_environment, without_vlmoe) as call:
        yield call
