"""What vLLM's Transformers modeling backend asks of a multimodal mixture of experts, one test each.

vLLM itself is not run here. The requirements are those of its documentation ("Writing custom
models") and of what its backend calls, vllm/model_executor/models/transformers/{base,moe,
multimodal,causal}.py, for transformers 5.15 and later; each test makes those calls.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from jinja2 import nodes
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.chat_template_utils import _compile_jinja_template

from vlmoe import VLMoEForConditionalGeneration, VLMoEModel
from vlmoe.modeling_vlmoe.sparse_moe import VLMoESparseMoeBlock
from vlmoe.processing.chat_template import DEFAULT_CHAT_TEMPLATE
from vlmoe.processing.processing_vlmoe import VLMoEProcessor
from vlmoe.upcycling.image_parts import with_image_parts

Model = VLMoEForConditionalGeneration

TEXT = {
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "mlp_only_layers": [1],
    "num_shared_experts": 1,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 1.5,
    "logits_scaling": 4.0,
    "vocab_size": 320,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "one tile": {},
    "with markers": {"image_start_token": "<row_1_col_1>", "image_end_token": "<global-img>"},
    "tiles": {"tiling": True},
}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    """Everything that the backend has to find: both attentions, dense and sparse layers, scales."""
    return tiny_model(text=TEXT)


@pytest.fixture(scope="module")
def folder(model: Model, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that vLLM is given."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    VLMoEProcessor.for_config(model.config, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(params=LAYOUTS)
def processor(request: pytest.FixtureRequest, model: Model, tokenizer: Any) -> VLMoEProcessor:
    """A processor for each way to lay out an image."""
    return VLMoEProcessor.for_config(model.config, tokenizer, **LAYOUTS[request.param])


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    attention_instances: dict[int, SimpleNamespace] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As vLLM's: looks its own layer up, knows neither mask nor batch, returns (tokens, width)."""
    assert attention_instances is not None and query.shape[0] == 1
    layer = attention_instances[module.layer_idx]
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (layer.sliding_window or length))
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return output[0].transpose(0, 1).reshape(length, -1), None


@pytest.fixture
def vllm_attention() -> Iterator[None]:
    """The attention registered as vLLM registers it, for one test."""
    AttentionInterface.register("vllm", paged_attention)
    yield
    del ALL_ATTENTION_FUNCTIONS._global_mapping["vllm"]


def test_config_json_names_the_base_model_in_auto_map(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModel"].endswith(".VLMoEModel")
    assert config["architectures"] == ["VLMoEForConditionalGeneration"]


def test_the_base_model_and_its_parts_are_backend_compatible(folder: Path) -> None:
    with torch.device("meta"):
        base = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    assert type(base) is VLMoEModel
    assert base.is_backend_compatible()
    assert base.get_decoder().is_backend_compatible()
    assert base.get_encoder(modality="image").is_backend_compatible()


def test_kwargs_reach_the_attention_interface_of_every_layer(
    model: Model, folder: Path, processor: VLMoEProcessor, make_image: Any, vllm_attention: None
) -> None:
    inputs = processor(text="what <image>? <image>", images=[make_image(1), make_image(2)])
    inputs = inputs.convert_to_tensors("pt")
    inputs.pop("mm_token_type_ids")
    with torch.no_grad():
        expected = model.model(**inputs).last_hidden_state[0]

    config = AutoConfig.from_pretrained(folder)
    config.text_config._attn_implementation = "vllm"
    with init_empty_weights(include_buffers=False):
        base = AutoModel.from_config(config).eval()
    base.load_state_dict(model.model.state_dict(), assign=True)
    text = config.get_text_config()
    windows = {"sliding_attention": text.sliding_window, "full_attention": None}
    layers = {
        i: SimpleNamespace(sliding_window=windows[text.layer_types[i]])
        for i in range(text.num_hidden_layers)
    }
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    with torch.no_grad():
        features = base.get_image_features(**inputs).pooler_output
        embeddings = base.get_input_embeddings()(ids)
        embeddings[ids == processor.image_token_id] = features.flatten(0, 1)
        output = base(
            input_ids=None,
            inputs_embeds=embeddings,
            use_cache=False,
            position_ids=torch.arange(mask.shape[1])[None],
            attention_instances=layers,
            return_dict=False,
        )
    torch.testing.assert_close(output[0][0], expected, rtol=0, atol=1e-5)


def test_experts_are_a_module_of_that_name_with_packed_3d_parameters_only(model: Model) -> None:
    text = model.config.get_text_config()
    blocks = [m for m in model.modules() if isinstance(m, VLMoESparseMoeBlock)]
    assert len(blocks) == 2
    for block in blocks:
        shapes = {name: tuple(p.shape) for name, p in block.experts.named_parameters()}
        experts, width = text.num_experts, text.moe_intermediate_size
        assert shapes == {
            "gate_up_proj": (experts, 2 * width, text.hidden_size),
            "down_proj": (experts, text.hidden_size, width),
        }
        names = list(inspect.signature(block.experts.forward).parameters)
        assert names[:3] == ["hidden_states", "top_k_index", "top_k_weights"]
        assert any("shared_expert" in name for name, _ in block.named_parameters())


def test_the_sparse_block_calls_whatever_stands_in_for_the_experts(model: Model) -> None:
    class Experts(nn.Module):
        def __init__(self, experts: nn.Module) -> None:
            super().__init__()
            self.experts = [experts]

        def forward(
            self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
        ) -> torch.Tensor:
            ids, weights = topk_ids.to(torch.int32), topk_weights.to(torch.float32)
            return self.experts[0](hidden_states, ids.long(), weights)

    block = model.model.language_model.layers[0].mlp
    hidden_states = torch.randn(1, 7, model.config.text_config.hidden_size)
    experts, (expected, *_) = block.experts, block(hidden_states)
    try:
        block.experts = Experts(experts)
        assert torch.equal(block(hidden_states)[0], expected)
    finally:
        block.experts = experts


def test_the_text_config_has_the_fields_that_the_backend_reads(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    assert text is config.text_config and text != config  # this makes it multimodal
    for field in (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "sliding_window", "max_position_embeddings"),
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    ):
        assert getattr(text, field) > 0, field
    assert len(text.layer_types) == text.num_hidden_layers
    assert set(text.layer_types) <= {"full_attention", "sliding_attention"}
    assert text.norm_topk_prob is True
    assert text.hidden_act == "silu"  # the one activation that vLLM gives such experts
    assert text.rope_parameters["rope_type"] != "dynamic"


def test_the_tensor_parallel_plan_covers_every_linear_of_the_decoder(model: Model) -> None:
    plan = {f"model.{pattern}": style for pattern, style in model.model.tp_plan.items()}
    styles = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "colwise")
    styles |= {"o_proj": "rowwise", "down_proj": "rowwise"}
    linears = [
        f"model.language_model.{name}"
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    assert len(linears) == 3 * (4 + 3)
    for name in linears:
        found = [style for pattern, style in plan.items() if re.match(pattern, name)]
        assert found[:1] == [styles[name.rpartition(".")[2]]], name


def test_the_pipeline_parallel_plan_names_the_parts_around_one_list_of_layers(
    model: Model,
) -> None:
    assert model.model.supports_pp_plan
    parts = {name: attrgetter(name)(model.model) for name in model.model._pp_plan}
    lists = [name for name, part in parts.items() if isinstance(part, nn.ModuleList)]
    assert lists == ["language_model.layers"]
    decoder = model.model.get_decoder()
    planned = {id(p) for part in parts.values() for p in part.parameters()}
    assert planned == {id(p) for p in decoder.parameters()}


def test_layers_of_other_pipeline_stages_may_hand_on_their_input(
    tiny_model: Callable[..., Model],
) -> None:
    class Missing(nn.Identity):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args[0]

    decoder = tiny_model().model.language_model
    alone = tiny_model(text={"num_hidden_layers": 1}).model.language_model
    alone.load_state_dict(
        {
            name.replace("layers.1.", "layers.0."): tensor
            for name, tensor in decoder.state_dict().items()
            if not name.startswith(("layers.0.", "layers.2."))
        }
    )
    decoder.layers[0], decoder.layers[2] = Missing(), Missing()
    ids = torch.arange(6, 12)[None]
    with torch.no_grad():
        expected = alone(ids, use_cache=False).last_hidden_state
        assert torch.equal(decoder(ids, use_cache=False).last_hidden_state, expected)


def test_input_embeddings_decoder_and_encoder_can_be_found_and_replaced(
    tiny_model: Callable[..., Model],
) -> None:
    base = tiny_model().model
    replacement = nn.Embedding(99, 32)
    base.set_input_embeddings(replacement)
    assert base.get_input_embeddings() is replacement
    assert base.language_model.embed_tokens is replacement
    assert base.get_decoder() is base.language_model
    assert base.get_encoder(modality="image") is base.vision_tower


def test_weights_are_saved_below_the_base_model_s_children_or_the_head(model: Model) -> None:
    children = "|".join(name for name, _ in model.model.named_children())
    for name in model.state_dict():
        assert re.match(rf"model\.({children})\.|lm_head\.weight$", name), name


def test_logits_are_the_head_times_logit_scale(model: Model) -> None:
    ids = torch.arange(6, 12)[None]
    with torch.no_grad():
        hidden_states = model.model(ids).last_hidden_state
        logits = model.lm_head(hidden_states) * model.config.get_text_config().logit_scale
        torch.testing.assert_close(logits, model(ids).logits)


def test_the_processor_reports_what_each_placeholder_expands_to(
    processor: VLMoEProcessor, make_image: Any
) -> None:
    images = [make_image(1), make_image(2, size=(40, 30))]
    output = processor(
        text=processor.image_token * 2, images=images, return_text_replacement_offsets=True
    )
    (entries,) = output["text_replacement_offsets"]
    assert [entry["type"] for entry in entries] == ["image", "image"]
    ids = [
        processor.tokenizer(entry["replacement"], add_special_tokens=False)["input_ids"]
        for entry in entries
    ]
    assert ids[0] + ids[1] == output["input_ids"][0]
    for sequence in ids:  # the most frequent token is taken for the one that holds embeddings
        assert torch.tensor(sequence).mode().values == processor.image_token_id


def test_the_processor_plans_tokens_and_tiles_from_image_sizes(
    processor: VLMoEProcessor, make_image: Any
) -> None:
    sizes = [(20, 24), (30, 40)]  # height, width
    plan = processor._get_num_multimodal_tokens(image_sizes=sizes)
    for i, (height, width) in enumerate(sizes):
        image = make_image(size=(width, height))
        output = processor(text=processor.image_token, images=[image], return_tensors="pt")
        assert plan["num_image_tokens"][i] == output["input_ids"].shape[1]
        assert plan["num_image_patches"][i] == output["pixel_values"].shape[1]
    largest = processor._get_num_multimodal_tokens(image_sizes=([10_000, 10_000],))
    assert largest["num_image_tokens"][0] >= max(plan["num_image_tokens"])


def test_features_of_one_image_are_as_many_as_its_image_tokens(
    model: Model, processor: VLMoEProcessor, make_image: Any
) -> None:
    images = [make_image(1), make_image(2, size=(40, 30))]
    sizes = [(image.height, image.width) for image in images]
    tiles = processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_patches"]
    output = processor(text=processor.image_token * 2, images=images, return_tensors="pt")
    text_fields = {"input_ids", "attention_mask", "mm_token_type_ids"}
    fields = {name: tensor for name, tensor in output.items() if name not in text_fields}
    with torch.no_grad():
        together = model.model.get_image_features(**fields).pooler_output
        assert isinstance(together, torch.Tensor)  # else each tile would count as an image
        split = [tensor.split(tiles, dim=1) for tensor in fields.values()]
        alone = [
            model.model.get_image_features(**dict(zip(fields, item, strict=True))).pooler_output
            for item in zip(*split, strict=True)
        ]
    per_tile = processor.image_seq_len
    assert [len(item.flatten(0, 1)) for item in alone] == [count * per_tile for count in tiles]
    torch.testing.assert_close(torch.cat(alone), together)
    assert (output["input_ids"] == processor.image_token_id).sum() == sum(tiles) * per_tile


def test_the_saved_processor_has_an_image_token_and_an_image_processor(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert processor.image_token_id == token_id == AutoConfig.from_pretrained(folder).image_token_id
    assert hasattr(processor, "image_processor")
    assert not hasattr(processor, "video_processor") and not hasattr(processor, "feature_extractor")
    output = processor(text="a", return_mm_token_type_ids=True, return_tensors="pt")
    assert set(output) == {"input_ids", "attention_mask", "mm_token_type_ids"}


@pytest.mark.parametrize("is_upcycled", [False, True])
def test_servers_see_that_contents_are_lists_of_parts(is_upcycled: bool) -> None:
    """vLLM decides by the template's syntax tree: a loop over `content`, or a macro's parameter."""
    template = DEFAULT_CHAT_TEMPLATE
    if is_upcycled:
        template = with_image_parts("{%- for m in messages -%}{{- m.content -}}{%- endfor -%}")
    environment = _compile_jinja_template(template).environment
    loops = [
        loop
        for macro in environment.parse(template).find_all(nodes.Macro)
        for loop in macro.find_all(nodes.For)
        if isinstance(loop.iter, nodes.Name) and loop.iter.name in {a.name for a in macro.args}
    ]
    assert loops


@pytest.mark.parametrize(
    "fields",
    [{"router_modality_bias": True}, {"modality_experts": {"text": [0, 1], "image": [2, 3]}}],
)
def test_routing_by_modality_is_refused_where_types_are_unknown(
    fields: dict[str, Any], tiny_model: Callable[..., Model]
) -> None:
    """vLLM gives embeddings that hold image features, and no token types: all would be text."""
    base = tiny_model(text=fields).model
    embeddings = torch.randn(1, 5, 32)
    with pytest.raises(ValueError, match=r"modality_experts.*vLLM does not say"):
        base(inputs_embeds=embeddings, attention_instances={}, use_cache=False)
    types = torch.tensor([[0, 1, 1, 0, 0]])
    base(inputs_embeds=embeddings, mm_token_type_ids=types, use_cache=False)
