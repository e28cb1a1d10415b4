"""The routing of transformers' own sparse models, counted by the recorder and by hand."""

import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ranks import on_ranks
from sparse_families import (
    FAMILIES,
    IMAGE,
    SPARSE_TEXTS,
    START,
    TEXT,
    TOP_K,
    VIDEO,
    FamilyCollator,
    family_config,
    row,
    sparse_family,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Llama4TextConfig, PreTrainedModel

import vlmoe
from vlmoe.routing.kinds import KINDS, PADDING, token_kinds
from vlmoe.routing.load import ExpertLoad, record_expert_load
from vlmoe.routing.record import has_experts
from vlmoe.routing.routed_layers import routed_layers, selection_bias
from vlmoe.routing.scoring import router_scoring

FAST = ("mixtral", "gpt_oss", "deepseek_v3", "qwen3_vl_moe", "ernie4_5_vl_moe", "llava_qwen3_moe")
SIGMOID = ("deepseek_v3", "lfm2_moe", "glm4v_moe", "minimax_m3_vl", "glm4_moe")
BANKS = {"decoder": ".text_moe.", "vision": ".vision_moe."}
"""Of ERNIE-4.5-VL."""

Counts = dict[tuple[str, int], dict[str, Counter[int]]]


def marked_slow(*fast: str) -> list[Any]:
    """Return all families; those that are not `fast` are for the slow tests."""
    return [pytest.param(n, marks=() if n in fast else pytest.mark.slow) for n in FAMILIES]


def batch(name: str) -> dict[str, torch.Tensor]:
    """Three rows of different lengths, two of which have an image unless the model has no tower."""
    images = 0 if name in SPARSE_TEXTS else 1
    rows = [row(9, 2, 0, images), row(14, 2, 1), row(5, 2, 2, images)]
    inputs = FamilyCollator(name)(rows)
    del inputs["labels"]
    return inputs


def by_hand(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[Counts, dict]:
    """Choices and entropies by place and layer and by kind, from what the routers return.

    Loops over tokens in plain Python; padding left out.
    """
    seen: dict[str, tuple[torch.Tensor, ...]] = {}
    routers = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("gate", "router") and "shared" not in name
    }
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        for name, module in routers.items()
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    ids, mask = inputs["input_ids"].flatten().tolist(), inputs["attention_mask"].flatten().tolist()
    counts: Counts = {}
    entropies: dict[tuple[str, int], dict[str, list[float]]] = {}
    for name, output in seen.items():
        choice = next(part for part in output if not part.is_floating_point())
        logits = next(part for part in output if part.shape[-1] == 4 and part.is_floating_point())
        place = "vision" if BANKS["vision"] in name else "decoder"
        is_mine = [
            not any(bank in name for bank in BANKS.values())
            or (token == IMAGE) == (place == "vision")
            for token in ids
        ]
        tokens = [i for i, mine in enumerate(is_mine) if mine]
        assert len(tokens) == len(choice)
        index = next(int(part) for part in name.split(".") if part.isdecimal())
        kinds = counts[place, index] = {"text": Counter(), "image": Counter()}
        sums = entropies[place, index] = {"text": [], "image": []}
        for token, experts, values in zip(tokens, choice.tolist(), logits.tolist(), strict=True):
            if mask[token]:
                kind = "image" if ids[token] == IMAGE else "text"
                kinds[kind].update(experts)
                sums[kind].append(entropy(model, values))
    return counts, entropies


def entropy(model: PreTrainedModel, values: list[float]) -> float:
    """Of the distribution of one token."""
    kind = model.config.get_text_config().model_type.removesuffix("_text")
    if kind == "gemma4":
        scores = values
    elif any(kind.startswith(sigmoid) for sigmoid in SIGMOID):
        scores = [1 / (1 + math.exp(-value)) for value in values]
    else:
        scores = [math.exp(value) for value in values]
    return -sum(p * math.log(p) for p in (score / sum(scores) for score in scores))


def assert_counts(load: ExpertLoad, counts: Counts, times: int = 1) -> None:
    places = {"decoder": load} | load.vision
    assert {place for place, _ in counts} == set(places)
    for place, of_place in places.items():
        right = {index: kinds for (where, index), kinds in counts.items() if where == place}
        assert of_place.layers == tuple(right) and of_place.top_k == TOP_K
        for found, kinds in zip(of_place.assignments, right.values(), strict=True):
            for number, kind in enumerate(("text", "image")):
                expected = [times * kinds[kind][expert] for expert in range(4)]
                assert found[number].tolist() == expected, (place, kind)
            assert not found[2:].any(), "there is no video"


@pytest.mark.parametrize("name", marked_slow(*FAST))
def test_load_and_entropy_of_every_family_equal_a_count_by_hand(name: str) -> None:
    model, inputs = sparse_family(name).eval(), batch(name)
    counts, entropies = by_hand(model, inputs)
    with vlmoe.record_routing(model) as routing, torch.no_grad():
        model(**inputs)
        model(**inputs)
    assert_counts(routing.load, counts, times=2)
    with torch.no_grad():
        model(**inputs)
    assert_counts(routing.load, counts, times=2)  # no hook was left
    for place, load in ({"decoder": routing.load} | routing.load.vision).items():
        figures = load.as_dict()
        for layer, index in enumerate(load.layers):
            for kind, values in entropies[place, index].items():
                found = figures["router_entropy"][kind][layer]
                if not values:
                    assert found is None
                else:
                    assert found == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert_choices(routing, counts, inputs)


def test_a_router_without_known_probabilities_has_a_load_and_no_entropy() -> None:
    config = AutoConfig.for_model("phimoe", **TEXT | {"num_local_experts": 4})
    torch.manual_seed(0)
    model, inputs = AutoModelForCausalLM.from_config(config).eval(), batch("mixtral")
    counts, _ = by_hand(model, inputs)
    with vlmoe.record_routing(model, choices=False) as routing, torch.no_grad():
        model(**inputs)
    assert_counts(routing.load, counts)
    assert not routing.forwards
    entropies = routing.load.as_dict()["router_entropy"]
    assert set(entropies["all"]) == set(entropies["text"]) == {None}


def assert_choices(routing: Any, counts: Counts, inputs: dict[str, torch.Tensor]) -> None:
    """The kept choices are those that were counted, and belong to their tokens."""
    first, _ = routing.forwards
    for layer, index in enumerate(routing.layers):
        kept: dict[str, Counter[int]] = {"text": Counter(), "image": Counter()}
        for token, kind, experts in zip(
            first.token_ids.flatten().tolist(),
            first.kinds.flatten().tolist(),
            first.experts[layer].flatten(0, 1).tolist(),
            strict=True,
        ):
            if kind != PADDING:
                assert (KINDS[kind] == "image") == (token == IMAGE)
                kept[KINDS[kind]].update(experts)
        right = [kinds for (_, where), kinds in counts.items() if where == index]
        for kind in kept:
            assert kept[kind] == sum((kinds[kind] for kinds in right), Counter())
    assert (first.weights[..., 0] >= first.weights[..., 1]).all()
    assert (first.token_ids == inputs["input_ids"]).all()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "qwen3_vl_moe" else pytest.mark.slow) for n in FAMILIES],
)
def test_checkpointing_counts_no_token_twice(name: str, use_reentrant: bool) -> None:
    model, inputs = sparse_family(name).train(), batch(name)
    counts, _ = by_hand(model.eval(), inputs)
    model.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    with record_expert_load(model, training_only=True) as load:
        model(**inputs, use_cache=False).logits.square().mean().backward()
        with torch.no_grad():
            model.eval()(**inputs)
    assert_counts(load, counts)


@pytest.mark.parametrize("name", marked_slow(*FAST))
def test_generation_counts_each_token_once(name: str) -> None:
    model, inputs = sparse_family(name).eval(), batch(name)
    inputs = {
        key: value.flip(1) if value.shape == inputs["input_ids"].shape else value
        for key, value in inputs.items()
    }  # padding on the left, and so generate continues
    inputs["input_ids"] = torch.where(inputs["input_ids"] == 9, START, inputs["input_ids"])
    if name == "minimax_m3_vl":  # its forward pass takes none
        del inputs["mm_token_type_ids"]
    with vlmoe.record_routing(model) as routing, torch.no_grad():
        tokens = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    fed = tokens[:, :-1]  # the last new token is not fed back
    loads = (routing.load, *routing.load.vision.values())
    per_layer = Counter[int]()
    for load in loads:
        for index, of_layer in zip(load.layers, load.assignments, strict=True):
            per_layer[index] += int(of_layer.sum())
    assert set(per_layer.values()) == {TOP_K * int((fed != 0).sum())}
    image_counts = sum(int(load.image_counts.sum()) for load in loads)
    assert image_counts == TOP_K * int((fed == IMAGE).sum()) * len(per_layer)
    for of_row, ids in zip(routing.sequences(), fed, strict=True):
        assert of_row.token_ids.tolist() == ids[ids != 0].tolist()


@pytest.mark.parametrize("name", ["mixtral", pytest.param("gemma4", marks=pytest.mark.slow)])
def test_an_adapted_native_model_is_recorded_too(name: str) -> None:
    inputs = batch(name)
    counts, _ = by_hand(sparse_family(name).eval(), inputs)
    model = sparse_family(name).eval()
    config = LoraConfig(
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        target_modules=["q_proj", "q_proj.linear"],
        exclude_modules=".*vision.*",
    )
    adapted = get_peft_model(model, config)
    with record_expert_load(adapted) as load, torch.no_grad():
        adapted(**inputs)
    assert_counts(load, counts)


@pytest.mark.parametrize("name", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_counting_a_native_model_becomes_part_of_the_one_compiled_graph(name: str) -> None:
    model, inputs = sparse_family(name).eval(), batch(name)
    model.set_experts_implementation("grouped_mm")
    counts, _ = by_hand(model, inputs)
    torch._dynamo.reset()
    with record_expert_load(model) as load, torch.no_grad():
        torch.compile(model, fullgraph=True, backend="eager")(**inputs, use_cache=False)
    torch._dynamo.reset()
    assert_counts(load, counts)


def test_videos_are_a_kind_of_their_own() -> None:
    model = sparse_family("qwen3_vl_moe").eval()
    ids = torch.tensor([[20, START, *[IMAGE] * 4, 9, START, *[VIDEO] * 4, 9, 21, 0]])
    mask = (ids != 0).long()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(16, 96, generator=generator)
    grid = torch.tensor([[1, 4, 4]])
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    inputs |= {"pixel_values_videos": pixels, "image_grid_thw": grid, "video_grid_thw": grid}
    inputs["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    with vlmoe.record_routing(model) as routing, torch.no_grad():
        model(**inputs)
    figures = routing.load.as_dict()
    assert figures["tokens"] == {"text": [6, 6], "image": [4, 4], "video": [4, 4], "all": [14, 14]}
    assert len(figures["video_share"]) == 2 and sum(figures["video_share"][0]) == pytest.approx(1)
    [sequence] = routing.sequences()
    assert sequence.kinds.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2, 0, 0]


def test_kinds_follow_from_ids_or_types() -> None:
    config = family_config("glm4v_moe")
    ids = torch.tensor([[20, IMAGE, IMAGE, VIDEO, 0]])
    types = torch.tensor([[0, 1, 2, 2, 0]])  # frames of a video are image tokens there
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    plain = {"input_ids": ids, "attention_mask": mask}
    assert token_kinds(plain, config).tolist() == [[0, 1, 1, 2, PADDING]]
    assert token_kinds(plain | {"mm_token_type_ids": types}, config).tolist() == [
        [0, 1, 2, 2, PADDING]
    ]
    embeds = {"inputs_embeds": torch.zeros(1, 5, 3)}
    assert token_kinds(embeds, config).tolist() == [[0] * 5]
    types[0, 4] = 3  # audio
    assert token_kinds(embeds | {"mm_token_type_ids": types}, config).tolist() == [[0, 1, 2, 2, 0]]


def llama4() -> nn.Module:
    config = Llama4TextConfig(
        hidden_size=16, intermediate_size=8, intermediate_size_mlp=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=32,
        num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (llama4, "Llama4ForCausalLM .* in its own way"),
        (lambda: sparse_family("llava_dense"), "LlavaForConditionalGeneration .* dense"),
        (lambda: nn.Linear(1, 1), "Linear .* dense"),
    ],
)
def test_models_without_experts_under_the_interface_are_refused(
    build: Callable[[], nn.Module], match: str
) -> None:
    model = build()
    assert not has_experts(model)
    for record in (vlmoe.record_routing, record_expert_load):
        with pytest.raises(ValueError, match=match), record(model):
            pytest.fail("recorded")


@pytest.mark.parametrize("name", FAMILIES)
def test_each_sparse_layer_is_found_once_with_its_router(name: str) -> None:
    with torch.device("meta"):
        model = sparse_family(name)
    layers = routed_layers(model)
    banks = 2 if name == "ernie4_5_vl_moe" else 1
    first = model.config.get_text_config().num_hidden_layers - len(layers) // banks
    assert [layer.index for layer in layers] == [i for i in range(first, 2) for _ in range(banks)]
    assert {layer.place for layer in layers} <= {"decoder", "vision"}
    for layer in layers:
        assert (layer.num_experts, layer.top_k) == (4, TOP_K)
        assert model.get_submodule(layer.name) is layer.experts


def test_asking_a_router_for_its_scoring_leaves_its_hooks_and_weights_alone() -> None:
    model = sparse_family("glm4v_moe")
    layer = routed_layers(model)[0]
    before = {name: tensor.clone() for name, tensor in layer.router.state_dict().items()}
    handle = layer.router.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    assert router_scoring(layer).kind == "sigmoid"
    handle.remove()
    assert all(torch.equal(before[n], t) for n, t in layer.router.state_dict().items())


def test_the_docs_table_of_models_that_can_be_recorded_is_true() -> None:
    page = Path(__file__).parents[2] / "docs/how-to/inspect_routing.md"
    rows = {line for line in page.read_text(encoding="utf-8").splitlines() if line[:3] == "| `"}
    for name in FAMILIES:
        layer = routed_layers(sparse_family(name))[0]
        bias = "no" if selection_bias(layer) is None else "yes"
        inside = re.sub("^(llava|internvl)_", r"\1` with `", name)
        assert f"| `{inside}` | {router_scoring(layer).kind} | {bias} |" in rows
    assert len(rows) == len(FAMILIES) + 2


def test_under_expert_parallelism_the_experts_of_all_ranks_are_counted() -> None:
    """As transformers leaves a bank whose parameters are sharded: it names its rank's experts."""
    model, inputs = sparse_family("mixtral").eval(), batch("mixtral")
    counts, _ = by_hand(model, inputs)
    for layer in routed_layers(model):
        experts = layer.experts
        forward, experts.num_experts, experts._is_expert_parallel = experts.forward, 2, True

        def with_all(*arguments: torch.Tensor, bank: Any = experts, run: Any = forward) -> Any:
            bank.num_experts = 4
            output = run(*arguments)
            bank.num_experts = 2
            return output

        experts.forward = with_all
    with record_expert_load(model) as load, torch.no_grad():
        model(**inputs)
    assert_counts(load, counts)


def loads_of_rank(name: str, sharded: bool) -> list:
    """The load that each rank counts of its own row, summed over ranks."""
    model = sparse_family(name).train()
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        parallel: nn.Module = model
    else:
        parallel = nn.parallel.DistributedDataParallel(model)
    rank = torch.distributed.get_rank()
    inputs = {key: value[rank : rank + 1] for key, value in batch(name).items()}
    with record_expert_load(parallel, training_only=True) as load:
        parallel(**inputs).logits.square().mean().backward()
    figures = load.summed_over_ranks()
    return [figures.assignments.tolist(), figures.as_dict()["router_entropy"]["all"]]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_ranks_count_their_own_tokens_and_add_up(tmp_path: Path, sharded: bool) -> None:
    model, inputs = sparse_family("mixtral").eval(), batch("mixtral")
    with record_expert_load(model) as load, torch.no_grad():
        model(**{key: value[:2] for key, value in inputs.items()})
    ranks = on_ranks(loads_of_rank, "mixtral", sharded, folder=tmp_path)
    for assignments, entropies in ranks:
        assert assignments == load.assignments.tolist()
        assert entropies == pytest.approx(load.as_dict()["router_entropy"]["all"], rel=1e-5)
