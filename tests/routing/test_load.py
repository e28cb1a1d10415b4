"""Counted expert load and its figures against the router logits that the model returns."""

import math
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.configuration.configuration_vlmoe_text import Modality
from vlmoe.routing.load import ExpertLoad, load_shares, record_expert_load

IMAGE, K, EXPERTS = 5, 2, 4
KINDS = {"image": ("i",), "text": ("t",), "all": ("i", "t")}


def batch(rows: int = 3, length: int = 11, side: str = "left") -> dict[str, torch.Tensor]:
    """Rows with 4 image tokens each, and padding of 0, 2, 4, ... tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 90, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        padding = slice(0, 2 * row) if side == "left" else slice(length - 2 * row, length)
        ids[row, padding], mask[row, padding] = 0, 0
        start = 2 * row if side == "left" else 0
        ids[row, start + 1 : start + 5] = IMAGE
    pixels = torch.randn(rows, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def expected(model: VLMoEForConditionalGeneration, inputs: dict[str, Any]) -> dict[str, list]:
    """Counts by a loop over layers and tokens."""
    with torch.no_grad():
        logits = model(**inputs, output_router_logits=True).router_logits
    counts = {kind: torch.zeros(len(logits), logits[0].shape[1]).tolist() for kind in ("i", "t")}
    ids, mask = inputs["input_ids"].flatten(), inputs["attention_mask"].flatten()
    for layer, of_layer in enumerate(logits):
        for token, of_token in enumerate(of_layer):
            for expert in of_token.topk(K).indices.tolist():
                kind = "i" if ids[token] == IMAGE else "t"
                counts[kind][layer][expert] += int(mask[token])
    return counts


@pytest.mark.parametrize("side", ["left", "right"])
def test_counts_equal_those_of_the_router_logits(
    tiny_model: Callable[..., VLMoEForConditionalGeneration], side: str
) -> None:
    model, inputs = tiny_model(), batch(side=side)
    right = expected(model, inputs)
    with record_expert_load(model) as load, torch.no_grad():
        model(**inputs)
        model(**inputs)
    assert load.image_counts.tolist() == [[2 * n for n in row] for row in right["i"]]
    assert load.text_counts.tolist() == [[2 * n for n in row] for row in right["t"]]
    assert load.counts.sum(1).tolist() == [2 * K * int(inputs["attention_mask"].sum())] * 3
    with torch.no_grad():
        model(**inputs)
    assert load.counts.sum() == 3 * 2 * K * inputs["attention_mask"].sum(), "hooks were left"


def test_each_decoded_token_counts_once_as_text(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    model, inputs = tiny_model(), batch()
    with record_expert_load(model) as load:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    prompt = int(inputs["attention_mask"].sum())
    image_tokens = int((inputs["input_ids"] == IMAGE).sum())
    decoded = 3 * 3  # the last new token is not fed back
    assert load.image_counts.sum(1).tolist() == [K * image_tokens] * 3
    assert load.text_counts.sum(1).tolist() == [K * (prompt - image_tokens + decoded)] * 3


def test_a_row_that_has_ended_counts_no_more(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    model, inputs = tiny_model(), batch(side="left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    free = model.generate(**inputs, eos_token_id=None, **options)[:, -6:]
    end = int(free[0, 1])  # the first row's second token
    assert end != 0 and end not in free[1]
    with record_expert_load(model) as load:
        new = model.generate(**inputs, eos_token_id=end, **options)[:, -6:]
    assert new[0, 2:].tolist() == [0] * 4 and new[1].ne(0).all()
    prompt = int(inputs["attention_mask"].sum())
    decoded = int((new[:, :-1] != 0).sum())  # the last new token is not fed back
    assert load.counts.sum(1).tolist() == [K * (prompt + decoded)] * 3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_counts_no_token_twice(
    tiny_model: Callable[..., VLMoEForConditionalGeneration], use_reentrant: bool
) -> None:
    model, inputs = tiny_model().train(), batch()

    def recorded() -> dict[str, Any]:
        with record_expert_load(model) as load:
            for _ in range(2):
                model(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert load.counts.sum(1).tolist() == [2 * K * int(inputs["attention_mask"].sum())] * 3
        return load.as_dict()

    plain = recorded()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert recorded() == plain


def test_embeddings_are_split_by_their_token_types(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    model, inputs = tiny_model(), batch()
    types = (inputs["input_ids"] == IMAGE).long()
    # With images in them: the embedding of a placeholder would be an image that was forgotten.
    embeddings = model.get_input_embeddings()(inputs["input_ids"]) + 0.1
    with record_expert_load(model) as load, torch.no_grad():
        model(inputs_embeds=embeddings, mm_token_type_ids=types)
        model(inputs_embeds=embeddings)
    assert load.image_counts.sum(1).tolist() == [K * int(types.sum())] * 3
    assert load.counts.sum(1).tolist() == [2 * K * types.numel()] * 3


def test_shares_are_of_a_layers_assignments(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    assert load_shares(torch.tensor([[3, 1], [0, 0]])).tolist() == [[0.75, 0.25], [0.0, 0.0]]
    with record_expert_load(tiny_model()) as load:
        pass
    load.assignments += torch.tensor([[0, 0, 4, 4], [6, 0, 2, 0]])
    summary = load.as_dict()
    assert load.text_counts.tolist() == [[0, 0, 4, 4]] * 3
    assert summary["fair_share"] == 0.25
    assert summary["image_share"][0] == [0.75, 0.0, 0.25, 0.0]
    assert summary["all_share"][2] == [0.375, 0.0, 0.375, 0.25]
    assert summary["max_over_mean"] == [1.5] * 3 and summary["unused_experts"] == [1] * 3
    assert summary["tokens"] == {"image": [4] * 3, "text": [4] * 3, "all": [8] * 3}
    assert summary["overlap"] == [0.25] * 3
    load.reset()
    assert load.counts.sum() == 0 and load.as_dict()["overlap"] == [None] * 3


def plain_figures(
    model: VLMoEForConditionalGeneration, inputs: dict[str, Any], layer: int
) -> dict[str, Any]:
    """The figures of one layer, by loops over its router logits."""
    with torch.no_grad():
        logits = model(**inputs, output_router_logits=True).router_logits[layer].tolist()
    ids, mask = inputs["input_ids"].flatten().tolist(), inputs["attention_mask"].flatten().tolist()
    entropies: dict[str, list[float]] = {"i": [], "t": []}
    chosen: dict[str, Counter[int]] = {"i": Counter(), "t": Counter()}
    sigmoid = model.config.text_config.scoring_func == "sigmoid"
    for token, of_token in enumerate(logits):
        if not mask[token]:
            continue
        scores = [1 / (1 + math.exp(-x)) if sigmoid else math.exp(x) for x in of_token]
        probabilities = [score / sum(scores) for score in scores]
        kind = "i" if ids[token] == IMAGE else "t"
        entropies[kind].append(-sum(p * math.log(p) for p in probabilities))
        chosen[kind].update(sorted(range(EXPERTS), key=of_token.__getitem__)[-K:])
    figures: dict[str, Any] = {"shares": {}}
    for name, kinds in KINDS.items():
        values = [value for kind in kinds for value in entropies[kind]]
        counts = [sum(chosen[kind][expert] for kind in kinds) for expert in range(EXPERTS)]
        shares = figures["shares"][name] = [count / sum(counts) for count in counts]
        figures[name] = {
            "tokens": len(values),
            "router_entropy": sum(values) / len(values),
            "load_entropy": -sum(share * math.log(share) for share in shares if share),
            "max_violation": max(shares) / (sum(shares) / EXPERTS) - 1,
            "dead_experts": sum(share < 0.1 / EXPERTS for share in shares),
        }
    pairs = zip(figures["shares"]["image"], figures["shares"]["text"], strict=True)
    figures["overlap"] = sum(min(pair) for pair in pairs)
    return figures


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_every_figure_equals_a_count_in_plain_python(
    tiny_model: Callable[..., VLMoEForConditionalGeneration], scoring_func: str
) -> None:
    model, inputs = tiny_model(text={"scoring_func": scoring_func}), batch()
    model.get_parameter("model.language_model.layers.1.mlp.router.weight").data[2:] *= 0.01
    with record_expert_load(model) as load, torch.no_grad():
        model(**inputs)
        model(**inputs)
    summary = load.as_dict()
    for layer in range(3):
        right = plain_figures(model, inputs, layer)
        assert summary["overlap"][layer] == pytest.approx(right["overlap"])
        for kind in KINDS:
            assert summary[f"{kind}_share"][layer] == pytest.approx(right["shares"][kind])
            right[kind]["tokens"] *= 2
            for name, value in right[kind].items():
                assert summary[name][kind][layer] == pytest.approx(value, rel=1e-5, abs=1e-9)


def test_collapse_and_indecision_have_their_closed_forms(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    """Equal logits: the router is undecided, and ties go to the same k experts for all tokens."""
    model = tiny_model()
    for layer in model.model.language_model.layers:
        layer.mlp.router.weight.data.zero_()
    with record_expert_load(model) as load, torch.no_grad():
        model(**batch())
    summary = load.as_dict()
    for kind in KINDS:
        assert summary["router_entropy"][kind] == pytest.approx([math.log(EXPERTS)] * 3)
        assert summary["load_entropy"][kind] == pytest.approx([math.log(K)] * 3)
        assert summary["max_violation"][kind] == [EXPERTS / K - 1] * 3
        assert summary["dead_experts"][kind] == [EXPERTS - K] * 3
    assert summary["overlap"] == [1.0] * 3


def test_what_was_not_seen_is_none(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    text = {"mlp_only_layers": [0]}
    with record_expert_load(tiny_model(text=text)) as load:
        pass
    load.assignments[:, Modality.text] += torch.tensor([100, 100, 300, 10])
    load.entropy_sums[:] = math.nan
    summary = load.as_dict()
    assert summary["layers"] == [1, 2], "the dense layer has no experts"
    assert summary["max_violation"]["image"] == [None] * 2 == summary["overlap"]
    assert summary["router_entropy"]["text"] == [None] * 2, "JSON has no NaN"
    assert summary["dead_experts"]["text"] == [1] * 2, "10 is less than a tenth of 127.5"


def test_training_alone_can_be_recorded(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    model, inputs = tiny_model(), batch()
    model.train().activation_checkpointing_enable({"use_reentrant": True})
    with record_expert_load(model, training_only=True) as load:
        model(**inputs).logits.sum().backward()
        once = load.counts
        model.eval()(**inputs)
        with torch.no_grad():
            model.train()(**inputs)
    assert torch.equal(load.counts, once)
    assert once.sum(1).tolist() == [K * int(inputs["attention_mask"].sum())] * 3


def test_an_adapted_model_is_recorded_too(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    """PEFT calls the `forward` of its base model, past the hooks there."""
    right = expected(tiny_model(), batch())
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    with record_expert_load(adapted) as load, torch.no_grad():
        adapted(**batch())
    assert (load.image_counts.tolist(), load.text_counts.tolist()) == (right["i"], right["t"])


def test_no_logits_outlive_their_layer(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    model, logits = tiny_model(), []
    with record_expert_load(model), torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.mlp.router.register_forward_hook(
                lambda router, args, output: logits.append(weakref.ref(output[0]))
            )
            layer.register_forward_hook(
                lambda layer, args, output: logits.append(weakref.ref(output[1]))
            )
        model(**batch())
        assert len(logits) == 6 and all(reference() is None for reference in logits)


def test_counting_becomes_part_of_the_one_compiled_graph(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    model, inputs = tiny_model().train(), batch()
    model.set_experts_implementation("grouped_mm")

    def recorded(forward: Callable[..., Any]) -> dict[str, Any]:
        with record_expert_load(model) as load:
            for _ in range(2):
                forward(**inputs, labels=inputs["input_ids"]).loss.backward()
        return load.as_dict()

    right = recorded(model)
    torch._dynamo.reset()
    assert recorded(torch.compile(model, fullgraph=True, backend="aot_eager")) == right
    torch._dynamo.reset()


def test_a_model_without_experts_and_an_unknown_mask_are_refused(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    with (
        pytest.raises(ValueError, match="Linear has no experts"),
        record_expert_load(torch.nn.Linear(1, 1)),
    ):
        pass
    model, ids = tiny_model(), torch.full((1, 3), 9)
    with record_expert_load(model), pytest.raises(ValueError, match="attention mask"):
        model(input_ids=ids, attention_mask=torch.zeros(1, 1, 3, 3))


def test_experts_of_one_modality_are_measured_by_what_it_could_send_them() -> None:
    image, text = [0, 0, 60, 40, 0], [6, 1, 0, 0, 193]  # the middle one is of both
    load = ExpertLoad(
        layers=(0,),
        top_k=2,
        assignments=torch.tensor([[text, image]]),
        entropy_sums=torch.zeros(1, 2),
        allowed=torch.tensor([[True, True, True, False, True], [False, False, True, True, False]]),
    )
    figures = load.as_dict()
    assert figures["max_violation"]["image"] == [pytest.approx(0.6 * 2 - 1)]
    assert figures["max_violation"]["text"] == [pytest.approx(193 / 200 * 4 - 1)]
    assert figures["dead_experts"] == {"image": [0], "text": [2], "all": [1]}
    shares = torch.tensor(image) / 300 + torch.tensor(text) / 300
    fair = torch.tensor([1 / 6, 1 / 6, 1 / 6 + 1 / 6, 1 / 6, 1 / 6])
    assert figures["max_over_mean"] == [pytest.approx((shares / fair).max().item())]


def test_the_experts_of_each_modality_are_read_from_the_model(
    tiny_model: Callable[..., VLMoEForConditionalGeneration],
) -> None:
    model = tiny_model(text={"modality_experts": {"text": [0, 2], "image": [1, 2, 3]}})
    with record_expert_load(model) as load, torch.no_grad():
        model(**batch())
    assert load.allowed.tolist() == [[True, False, True, False], [False, True, True, True]]
    assert not load.image_counts[:, 0].any() and not load.text_counts[:, [1, 3]].any()
    assert load.image_counts.any() and load.as_dict()["dead_experts"]["text"] == [0, 0, 0]
