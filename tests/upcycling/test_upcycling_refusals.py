"""What does not fit exactly, or makes no sense, is refused before anything is converted."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.configuration import hub_code
from vlmoe.upcycling.dense_configs import REFUSED, text_fields, vlmoe_fields


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma3", "norms after attention"),
        ("qwen2_5_vl", "M-RoPE"),
        ("qwen3_vl", "M-RoPE"),
        ("llava_next", "anyres"),
        ("llava_onevision", "anyres"),
        ("paligemma", "prefix mask"),
        ("idefics2", "perceiver"),
        ("mllama", "cross-attention"),
        ("blip-2", "no exact conversion is known"),
    ],
)
def test_other_families_are_refused_by_name(model_type: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"'{model_type}' cannot be upcycled: .*{reason}"):
        vlmoe_fields(AutoConfig.for_model(model_type), tied=False)


@pytest.mark.parametrize(
    ("text_type", "reason"),
    [
        ("gemma2", "caps its logits"),
        ("gemma3_text", "two rotary tables"),
        ("olmo2", "span all heads"),
        ("cohere", "in parallel"),
        ("cohere2", "in parallel"),
        ("qwen2_5_vl_text", "M-RoPE"),
        ("mixtral", "experts already"),
        ("qwen3_moe", "experts already"),
        ("gpt2", "no exact conversion is known"),
    ],
)
def test_other_language_models_are_refused_by_name(text_type: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"'{text_type}' cannot be upcycled: .*{reason}"):
        text_fields(AutoConfig.for_model(text_type), tied=False)


def test_every_refused_type_is_one_of_transformers() -> None:
    for model_type in REFUSED:
        assert AutoConfig.for_model(model_type).model_type == model_type


def test_what_a_known_family_cannot_say_exactly_is_refused(
    text_config: Callable[..., Any], vision_sizes: dict[str, Any], dense_model: Callable[..., Any]
) -> None:
    vision = CLIPVisionConfig(**vision_sizes)

    def fields(**sub_configs: Any) -> None:
        parts = {"text_config": text_config("llama"), "vision_config": vision} | sub_configs
        vlmoe_fields(LlavaConfig(**parts), tied=False)

    for backbone in ("llama", "smollm3", "granite"):
        with pytest.raises(ValueError, match=r"mlp_bias"):
            fields(text_config=text_config(backbone, mlp_bias=True))
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0]}
    config = text_config("llama")
    config.rope_parameters = rope
    with pytest.raises(ValueError, match="longrope"):
        fields(text_config=config)
    with pytest.raises(ValueError, match="any size"):
        fields(vision_config=AutoConfig.for_model("pixtral"))
    internvl = dense_model("internvl").config
    internvl.downsample_ratio = 0.4
    with pytest.raises(ValueError, match=r"downsample_ratio.* is 0.4"):
        vlmoe_fields(internvl, tied=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_init": "random"}, "expert_init is 'random'; allowed: copy, shared, drop, noise"),
        ({"expert_split": 0}, "`expert_split` is 0"),
        ({"expert_split": 3}, "divisors of the dense model's `intermediate_size`, 40"),
        ({"expert_split": 2, "expert_init": "shared"}, "expert_init='copy'"),
        ({"sparse_layers": "some"}, "sparse_layers is 'some'; allowed: all, second_half"),
        ({"sparse_layers": 4}, "a number from 1 to 3"),
        ({"sparse_layers": [3]}, "indices from 0 to 2"),
        ({"sparse_layers": []}, "indices from 0 to 2"),
        ({"drop_ratio": 1.5}, "`drop_ratio` is 1.5"),
        ({"router_std": -1.0}, "`router_std` is -1.0"),
        ({"num_experts_per_tok": 5}, "`num_experts_per_tok` is 5; allowed: 1 to num_experts=4"),
        ({"norm_topk_prob": False}, "`norm_topk_prob` is False with 4 experts"),
        ({"num_experts_per_tok": 1}, "`num_experts_per_tok` is 1 and `norm_topk_prob` is not"),
        ({"expert_split": 2, "num_experts_per_tok": 1, "norm_topk_prob": False}, "add up to 1"),
        (
            {"vision_num_experts": 4, "vision_num_experts_per_tok": 1},
            "`vision_num_experts_per_tok` is 1 and `vision_norm_topk_prob` is not given",
        ),
        ({"vision_num_experts": 4, "vision_norm_topk_prob": False}, "`vision_norm_topk_prob` is"),
        ({"moe_intermediate_size": 8}, "an option is 'moe_intermediate_size'"),
        (
            {"expert_split": 2, "modality_experts": {"text": [0, 1, 2, 4], "image": [4, 5, 6, 7]}},
            "without the others of their copy",
        ),
        ({"sparse_type": "mixtral"}, "`sparse_type` is 'mixtral'; it is for native targets"),
        ({"expert_split": 2, "n_group": 8, "topk_group": 4}, "`n_group` is 8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_would_change_the_function_are_refused(
    options: dict[str, Any], message: str, dense_model: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError) as caught:
        VLMoEForConditionalGeneration.from_dense(dense_model(), **{"num_experts": 4} | options)
    assert message in str(caught.value)


def test_a_quantized_or_rounded_source_is_refused(
    dense_model: Callable[..., Any], tmp_path: Any
) -> None:
    dense = dense_model()
    dense.save_pretrained(tmp_path)
    for method in ("bitsandbytes", "gptq", "awq", "torchao"):
        config = AutoConfig.from_pretrained(tmp_path)
        config.quantization_config = {"quant_method": method}
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=rf"quantized \({method}\).*unquantized"):
            VLMoEForConditionalGeneration.from_dense(tmp_path, 4, 2)
    dense.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="quantized"):
        VLMoEForConditionalGeneration.from_dense(dense, 4, 2)
    with pytest.raises(ValueError, match=r"rotary table .*from_pretrained\(\.\.\., dtype="):
        VLMoEForConditionalGeneration.from_dense(dense_model().to(torch.bfloat16), 4, 2)


def test_a_copy_of_the_code_from_the_hub_says_what_upcycling_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(hub_code, "import_module", missing)
    with pytest.raises(ImportError, match="Upcycling needs the package: pip install vlmoe"):
        VLMoEForConditionalGeneration.from_dense("user/dense")


def test_what_is_no_dense_model_is_refused(
    tiny_model: Callable[..., Any],
    dense_model: Callable[..., Any],
    dense_parts: Callable[..., Any],
) -> None:
    with pytest.raises(ValueError, match="'vlmoe' cannot be upcycled: it has experts already"):
        VLMoEForConditionalGeneration.from_dense(tiny_model(), 4, 2)
    with pytest.raises(ValueError, match="`dense` is a Linear"):
        VLMoEForConditionalGeneration.from_dense(torch.nn.Linear(2, 2), 4, 2)
    dense = dense_model()
    dense.model.language_model.layers[1].mlp.extra = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.extra\.weight.*cannot hold"):
        VLMoEForConditionalGeneration.from_dense(dense, 4, 2)
    with pytest.raises(ValueError, match=r"`connector` has the field 'layers'; allowed: vision_"):
        VLMoEForConditionalGeneration.from_vision_text(
            *dense_parts(), 4, 2, connector={"layers": 1}
        )


def test_half_precision_is_split_by_powers_of_two(
    dense_model: Callable[..., Any], tmp_path: Any
) -> None:
    """Shards are multiplied by the split, which is exact in bf16 for powers of two alone."""
    dense_model().save_pretrained(tmp_path)
    half = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"`expert_split` is 5.*torch.bfloat16.*powers of two"):
        VLMoEForConditionalGeneration.from_dense(half, 4, 2, expert_split=5)
    report = VLMoEForConditionalGeneration.from_dense(half, 4, 2, expert_split=4).upcycling_report
    assert report.error <= 1e-5
