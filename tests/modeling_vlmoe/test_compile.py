"""torch.compile in one whole graph, of the forward and of generate's decoding, against eager.

Dynamo's tracing is what can fail on our side; the backend `eager` runs the traced graph as it is.
One slow test takes inductor.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from vlmoe import VLMoEForConditionalGeneration

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Inputs = dict[str, torch.Tensor]
Batch = Callable[..., Inputs]
Model = VLMoEForConditionalGeneration

COMPILABLE = ["grouped_mm", "batched_mm", "auto"]
PROMPTS = {  # rows, spelled as in conftest.py, and the form of their images
    "text": (["....", "......."], "flat"),
    "images": (["..ab...", "....c"], "padded"),
    "images, shared": (["..ab...", "....a"], "indexed"),
}
ROUTINGS: dict[str, dict[str, Any]] = {  # fields of the text config
    "plain": {},
    "modalities": {
        "modality_experts": {"text": [0, 1], "image": [1, 2, 3]},
        "router_modality_bias": True,
        "router_global_entropy_coef": {"image": 1.0},
        "router_local_entropy_coef": {"text": 1.0},
        "router_aux_loss_scope": "global",
    },
    "groups": {
        "n_group": 2,
        "topk_group": 1,
        "scoring_func": "sigmoid",
        "router_bias_update_rate": 0.1,
        "num_shared_experts": 1,
        "shared_expert_gate": True,
    },
}


@pytest.fixture
def model(tiny_model: Callable[..., Model]) -> Model:
    """A model with both kinds of attention layers."""
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return tiny_model(text={"sliding_window": 5} | layers)


def compile_whole(model: Model, backend: str = "eager") -> Callable[..., Any]:
    """The forward in one graph, or an error."""
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize(
    ("implementation", "prompt"),
    [*(("grouped_mm", prompt) for prompt in PROMPTS), ("batched_mm", "images"), ("auto", "images")],
)
def test_the_forward_compiles_into_one_graph_and_not_again_at_the_same_shape(
    model: Model, tiny_batch: Batch, implementation: str, prompt: str
) -> None:
    model.set_experts_implementation(implementation)
    rows, images = PROMPTS[prompt]
    inputs = tiny_batch(model.config, rows, images)
    others = tiny_batch(model.config, [row.replace("c", "d") for row in rows[::-1]], images)
    if prompt == "images":  # another number of padded tiles in another row
        others = tiny_batch(model.config, ["a.........", "..bc."], images)
    assert {k: v.shape for k, v in inputs.items()} == {k: v.shape for k, v in others.items()}
    compiled = compile_whole(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
        assert counters["stats"]["unique_graphs"] == 1
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(**others).logits, model(**others).logits)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_loss_and_its_gradients_compile_into_one_graph(
    tiny_model: Callable[..., Model], tiny_batch: Batch, routing: str
) -> None:
    model = tiny_model(text={"num_hidden_layers": 1} | ROUTINGS[routing]).train()
    inputs = tiny_batch(model.config, PROMPTS["images"][0])
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    gradients = []
    for forward in (model, compile_whole(model, "aot_eager")):
        model.zero_grad()
        forward(**inputs).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert not counters["graph_break"]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_eager_experts_cannot_be_compiled_into_one_graph(model: Model, tiny_batch: Batch) -> None:
    model.set_experts_implementation("eager")
    with pytest.raises(torch._dynamo.exc.UserError, match="for expert_idx in expert_hit"):
        compile_whole(model)(**tiny_batch(model.config, ["...."]))


def compile_config(backend: str = "eager") -> CompileConfig:
    """For `generate`, which on a CPU compiles only if told so."""
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return config


def assert_compiled_generation_equals_plain(model: Model, inputs: Inputs, backend: str) -> None:
    options = {"max_new_tokens": 7, "do_sample": False}
    options["suppress_tokens"] = [model.config.image_token_id]
    expected = model.generate(**inputs, **options)
    assert not counters["stats"]  # plain generation compiles nothing
    options |= {"cache_implementation": "static", "compile_config": compile_config(backend)}
    tokens = model.generate(**inputs, **options)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = model.generate(**inputs, **options)
    assert torch.equal(tokens, expected)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("prompt", ["text", "images"])
@pytest.mark.parametrize("implementation", COMPILABLE)
def test_generation_with_a_static_cache_compiles_one_graph_and_equals_plain_generation(
    tiny_model: Callable[..., Model], tiny_batch: Batch, implementation: str, prompt: str
) -> None:
    model = tiny_model(text={"num_hidden_layers": 2})
    model.set_experts_implementation(implementation)
    inputs = tiny_batch(model.config, *PROMPTS[prompt])
    assert_compiled_generation_equals_plain(model, inputs, "eager")


@pytest.mark.slow
def test_generation_compiled_by_inductor_equals_plain_generation(
    tiny_model: Callable[..., Model], tiny_batch: Batch
) -> None:
    model = tiny_model(text={"num_hidden_layers": 1})
    inputs = tiny_batch(model.config, *PROMPTS["images"])
    assert_compiled_generation_equals_plain(model, inputs, "inductor")
