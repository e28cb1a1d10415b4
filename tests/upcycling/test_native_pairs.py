"""Each native sparse model computes what the dense one computes, sees, saves and trains."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from native_dense import LANGUAGE_MODELS, VISION_MODELS, dense_model, language_config, vision_config
from torch import nn
from transformers import PreTrainedModel

from vlmoe.upcycling.conversion import NativeUpcycling, native_model
from vlmoe.upcycling.native_config import native_config
from vlmoe.upcycling.native_pairs import CONTAINERS, TEXT_PAIRS, WHOLE_PAIRS
from vlmoe.upcycling.native_plan import BIASES
from vlmoe.upcycling.native_sample import M_ROPE, drawn_inputs
from vlmoe.upcycling.native_target import SILENT_TOLERANCE
from vlmoe.upcycling.options import Upcycling
from vlmoe.upcycling.target import Sample

READER = Path(__file__).parents[1] / "reader_without_vlmoe.py"
FAST = ("qwen3_vl", "qwen3_5", "llava of cohere2", "smolvlm", "gemma4", "qwen3 to glm4_moe")
FULL = ["full_attention"] * 3
TIED = {"tie_word_embeddings": True}
Row = tuple[str, str | None, dict[str, Any], dict[str, Any]]  # type, text, fields, options
ROWS: dict[str, Row] = {
    **{kind: (kind, None, {}, {}) for kind in (*LANGUAGE_MODELS, *VISION_MODELS)},
    **{
        f"{kind} to glm4_moe": (kind, None, fields, {"sparse_type": "glm4_moe"})
        for kind, fields in (("llama", {}), ("qwen2", {"layer_types": FULL}), ("qwen3", TIED))
    },
    **{
        f"llava of {text}": ("llava", text, {}, {})
        for text in (
            *("llama", "mistral", "qwen2", "granite", "cohere2", "lfm2", "olmo2"),
            *("hunyuan_v1_dense", "smollm3", "phi3", "ernie4_5"),
        )
    },
    "llava_next of mistral": ("llava_next", "mistral", {}, {}),
    "internvl of qwen2": ("internvl", "qwen2", {}, {}),
    "mistral3 of ministral3": ("mistral3", "ministral3", {}, {}),
    "gemma4, small epsilon": ("gemma4", None, {"rms_norm_eps": 1e-12}, {}),
    "qwen3_vl, tied": ("qwen3_vl", None, TIED, {}),
    "qwen3_vl, split": ("qwen3_vl", None, {}, {"expert_split": 2}),
    "qwen3_5, split": ("qwen3_5", None, {}, {"expert_split": 2}),
    "llava of lfm2, split": ("llava", "lfm2", {}, {"expert_split": 2}),
    "mixtral, split": ("mistral", None, {}, {"expert_split": 2}),
    **{
        f"{kind}, shared": (kind, None, {}, {"expert_init": "shared"})
        for kind in ("qwen2", "qwen3_5", "cohere2", "ernie4_5", "hunyuan_v1_dense", "granite_swa")
    },
    "qwen3_vl, second half": ("qwen3_vl", None, {}, {"sparse_layers": "second_half"}),
    "lfm2, last layers": ("lfm2", None, {}, {"sparse_layers": [1, 2]}),
    "ernie4_5, a middle layer": ("ernie4_5", None, {}, {"sparse_layers": [1]}),
    "llama to glm4_moe, last layer": (
        *("llama", None, {}),
        {"sparse_type": "glm4_moe", "sparse_layers": [2]},
    ),
}


@dataclass
class Upcycled:
    """A row of the table: the dense model, and the native one with routers N(0, 1)."""

    name: str

    @cached_property
    def dense(self) -> PreTrainedModel:
        kind, text, fields, _ = ROWS[self.name]
        if kind in LANGUAGE_MODELS:
            return dense_model(language_config(kind, **fields))
        return dense_model(vision_config(kind, text, **fields))

    @cached_property
    def made(self) -> NativeUpcycling:
        return self.of(self.dense)

    def of(self, dense: PreTrainedModel) -> NativeUpcycling:
        # LFM2 divides by the sum of its sigmoid scores plus 1e-6: they must not all be near zero
        std = 0.1 if "lfm2" in self.name else 1.0
        return native_model(dense, 4, 2, router_std=std, **ROWS[self.name][3])

    @property
    def model(self) -> PreTrainedModel:
        return self.made.model

    @property
    def bound(self) -> float:
        # Gemma 4 adds a norm before a norm: exact in the limit of a small epsilon
        return SILENT_TOLERANCE if self.name == "gemma4" else 2e-6

    @cached_property
    def inputs(self) -> Sample:
        """Two images, one, and none, with a video for M-RoPE; padded on the left."""
        return drawn_inputs(self.dense)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in ROWS
        if name not in ("qwen3_vl_text", "gemma4_text")
    ],
)
def upcycled(request: pytest.FixtureRequest) -> Upcycled:
    return Upcycled(request.param)


def banks(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """The experts modules of a model."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
            yield name, module


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def distance(one: PreTrainedModel, other: PreTrainedModel, inputs: Sample) -> float:
    """Of the logits of real tokens, in shares of the largest."""
    real = inputs["attention_mask"].bool()
    return error(one(**inputs).logits[real], other(**inputs).logits[real])


@torch.no_grad()
def test_logits_are_the_dense_models(upcycled: Upcycled) -> None:
    dense, model = upcycled.dense, upcycled.model
    kinds = [(0, 0)]
    if hasattr(dense.config, "image_token_id"):
        kinds += [(1,), (2, 0)]
    for images in kinds:
        inputs = drawn_inputs(dense, images=images, frames=0)
        assert distance(model, dense, inputs) <= upcycled.bound, images
    assert distance(model, dense, upcycled.inputs) <= upcycled.bound
    assert upcycled.made.report.error <= upcycled.bound


@torch.no_grad()
def test_the_images_of_the_sample_show_in_the_logits(upcycled: Upcycled) -> None:
    """Otherwise the comparison would say nothing of them."""
    for name in ("pixel_values", "pixel_values_videos"):
        if name in upcycled.inputs:
            others = dict(upcycled.inputs) | {name: -upcycled.inputs[name].flip(-1)}
            moved = upcycled.dense(**others).logits - upcycled.dense(**upcycled.inputs).logits
            rows = moved.abs().amax((1, 2)) > 1e-3
            has_pixels = [True, True, False] if name == "pixel_values" else [False, False, True]
            assert rows.tolist() == has_pixels
    assert ("pixel_values_videos" in upcycled.inputs) == (
        upcycled.dense.config.model_type in M_ROPE
    )


@torch.no_grad()
def test_greedy_answers_are_the_dense_models(upcycled: Upcycled) -> None:
    how: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    answers = [
        model.generate(**upcycled.inputs, **how, pad_token_id=0)
        for model in (upcycled.dense, upcycled.model)
    ]
    assert torch.equal(*answers)


@torch.no_grad()
def test_every_expert_is_used_and_acts(upcycled: Upcycled) -> None:
    model, chosen = upcycled.model, {}

    def note(name: str) -> Any:
        return lambda module, args: chosen.__setitem__(name, set(args[1].flatten().tolist()))

    found = list(banks(model))
    hooks = [bank.register_forward_pre_hook(note(name)) for name, bank in found]
    before = model(**upcycled.inputs).logits
    for hook in hooks:
        hook.remove()
    assert len(found) == len([name for name in chosen])
    for name, bank in found:
        assert chosen[name] == set(range(len(bank.down_proj))), name
    if upcycled.name.startswith("gemma4") or "shared" in upcycled.name:
        return  # the routed experts add nothing yet
    for _, bank in found:
        kept = bank.down_proj[1].clone()
        bank.down_proj[1] = -kept
        assert error(model(**upcycled.inputs).logits, before) > 1e-3
        bank.down_proj[1] = kept


@torch.no_grad()
def test_bf16_is_no_further_than_the_dense_models_rounding(
    upcycled: Upcycled, tmp_path: Path
) -> None:
    """Root mean squares over the logits of a token; of a split, of the median token.

    Where routers compute in bf16 the scores of two copies can be equal, and shards of both are
    chosen.
    """
    upcycled.dense.save_pretrained(tmp_path)
    half = type(upcycled.dense).from_pretrained(tmp_path, dtype=torch.bfloat16)
    made = upcycled.of(half)
    assert made.report.error <= max(upcycled.bound, 5e-6)
    assert made.report.stored_dtype is not None
    real, inputs = upcycled.inputs["attention_mask"].bool(), upcycled.inputs
    wide = type(half).from_pretrained(tmp_path, dtype=torch.float32)
    for parameter, rounded in zip(wide.parameters(), half.parameters(), strict=True):
        parameter.copy_(rounded)
    dense, sparse, exact = (
        each(**inputs).logits[real].float() for each in (half, made.model, wide)
    )
    over = torch.median if "split" in upcycled.name else torch.mean
    distance, rounding = (over(d.square().mean(-1)) ** 0.5 for d in (sparse - dense, exact - dense))
    assert distance <= rounding


@torch.no_grad()
def test_the_dense_model_is_left_as_it_is(upcycled: Upcycled) -> None:
    theirs = {p.untyped_storage().data_ptr() for p in upcycled.dense.parameters()}
    ours = {p.untyped_storage().data_ptr() for p in upcycled.model.parameters()}
    assert not theirs & ours
    assert all(p.is_contiguous() for p in upcycled.model.parameters())


def test_training_reaches_every_expert_and_copies_drift_apart(upcycled: Upcycled) -> None:
    model = upcycled.of(upcycled.dense).model.train()
    labels = upcycled.inputs["input_ids"].masked_fill(upcycled.inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    reached = {name: torch.zeros(len(bank.down_proj)) for name, bank in banks(model)}
    for _ in range(3):
        model(**upcycled.inputs, labels=labels).loss.backward()
        for name, bank in banks(model):
            for weight in (bank.gate_up_proj, bank.down_proj):
                reached[name] += weight.grad.abs().sum((1, 2))
        optimizer.step()
        optimizer.zero_grad()
    split = ROWS[upcycled.name][3].get("expert_split", 1)
    for name, bank in banks(model):
        assert bool((reached[name] > 0).all()), name
        copies = bank.gate_up_proj[::split]
        assert all(bool((copies[0] != other).any()) for other in copies[1:]), name


@pytest.mark.parametrize("name", ["qwen3 to glm4_moe", "lfm2", "ernie4_5"])
def test_a_selection_bias_starts_at_zero_and_stays_in_fp32(name: str, tmp_path: Path) -> None:
    """Steps of bias balancing are smaller than what bf16 can hold."""
    upcycled = Upcycled(name)
    upcycled.dense.save_pretrained(tmp_path / "dense")
    half = type(upcycled.dense).from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    model = upcycled.of(half).model
    model.save_pretrained(tmp_path / "sparse")
    loaded = type(model).from_pretrained(tmp_path / "sparse", dtype="auto")
    for each in (model, loaded):
        biases = [b for n, b in each.state_dict().items() if n.endswith(BIASES)]
        assert len(biases) == 3
        assert all(bias.dtype == torch.float32 and not bias.any() for bias in biases)


def test_both_parts_of_a_whole_pair_keep_their_configuration() -> None:
    for kind in WHOLE_PAIRS:
        dense = vision_config(kind)
        made = native_config(dense, Upcycling(4, 2)).config
        for part in ("vision_config", None):
            ours, theirs = (
                (getattr(config, part) if part else config).to_dict() for config in (made, dense)
            )
            for name in ("model_type", "text_config", "vision_config"):
                if part is None or name == "model_type":
                    assert bool(ours.pop(name, None)) == bool(theirs.pop(name, None))
            assert ours == theirs


@pytest.mark.parametrize("init", ["noise", "drop"])
def test_perturbed_experts_differ_and_the_report_says_so(init: str) -> None:
    made = native_model(dense_model(language_config("qwen3")), 4, 2, expert_init=init)
    assert made.report.exactness == "not exact" and made.report.error > 1e-3
    for _, bank in banks(made.model):
        assert all(bool((bank.down_proj[0] != other).any()) for other in bank.down_proj[1:])


def saved_and_read(names: list[str], folder: Path) -> None:
    """Save models, load them in one process without vlmoe, and compare the logits bit by bit."""
    jobs, expected = [], []
    for name in names:
        upcycled, place = Upcycled(name), folder / name.replace(" ", "_")
        upcycled.model.save_pretrained(place)
        torch.save(dict(upcycled.inputs), place / "inputs.pt")
        jobs.append(["native", {"folder": str(place), "inputs": str(place / "inputs.pt")}])
        with torch.no_grad():
            expected.append(upcycled.model(**upcycled.inputs).logits)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    arguments = [str(folder / "jobs.json"), str(folder / "results.pt")]
    subprocess.run([sys.executable, "-P", str(READER), *arguments], check=True, timeout=600)
    for name, ours, theirs in zip(names, expected, torch.load(folder / "results.pt"), strict=True):
        assert torch.equal(ours, theirs), name


def test_plain_classes_load_what_was_saved(tmp_path: Path) -> None:
    saved_and_read(list(FAST), tmp_path)


@pytest.mark.slow
def test_plain_classes_load_every_pair(tmp_path: Path) -> None:
    rest = [name for name in ROWS if name not in (*FAST, "qwen3_vl_text", "gemma4_text")]
    saved_and_read(rest, tmp_path)


def test_every_pair_of_the_table_is_tested() -> None:
    tested = {(kind, options.get("sparse_type")) for kind, _, _, options in ROWS.values()}
    inner = {text or VISION_MODELS.get(kind, (kind,))[0] for kind, text, *_ in ROWS.values()}
    assert set(TEXT_PAIRS) <= inner
    for kind, pairs in TEXT_PAIRS.items():
        assert {(kind, pair.sparse) for pair in pairs[1:]} <= tested
    assert {*CONTAINERS, *WHOLE_PAIRS} == set(VISION_MODELS)
