"""Models and processors from a name: presets, saved folders, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmoe.training.build import ModelAndProcessor, build_model

TINIER = {
    "text_config": {"hidden_size": 32, "num_attention_heads": 2, "moe_intermediate_size": 24},
    "vision_config": {"hidden_size": 24, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4},
    "pixel_shuffle_factor": 2,
}
TEXTS = ["what color is the shape? blue"] * 3


def build(model: str = "tiny", **arguments: Any) -> ModelAndProcessor:
    return build_model(model, TEXTS, **{"model_overrides": TINIER} | arguments)


def test_a_presets_ids_are_those_of_its_tokenizer() -> None:
    model, processor = build(tiling=True)
    config, tokenizer = model.config, processor.tokenizer
    assert config.image_token_id == processor.image_token_id
    assert config.text_config.pad_token_id == tokenizer.pad_token_id
    assert config.text_config.vocab_size == 512 >= len(tokenizer)
    assert config.text_config.hidden_size == 32 and config.text_config.num_experts == 8
    assert processor.image_processor.do_image_splitting
    assert not build()[1].image_processor.do_image_splitting


def test_a_foreign_tokenizer_gets_the_tokens_of_the_chat_format(
    tmp_path: Path, saved_model: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    foreign = PreTrainedTokenizerFast.from_pretrained(saved_model)
    foreign.chat_template = "{{ messages }}"
    foreign.save_pretrained(tmp_path)
    model, processor = build(tokenizer=str(tmp_path))
    tokenizer = processor.tokenizer
    assert model.config.text_config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token == "<|end|>" and "generation" in processor.chat_template
    assert tokenizer.convert_tokens_to_ids("<row_4_col_4>") != tokenizer.unk_token_id


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model_overrides": {"text_config": {"num_expert": 4}}}, ValueError, "num_experts"),
        ({"model_overrides": {"pixel_shufle": 2}}, ValueError, "no field 'pixel_shufle'"),
        ({"model_overrides": {"text_config": {"num_experts": 1}}}, ValueError, "num_experts_per"),
        ({"tokenizer": "./nowhere"}, FileNotFoundError, "no tokenizer folder ./nowhere"),
        ({"dtype": "float"}, ValueError, None),
        ({"dtype": "int64"}, ValueError, "no number type of weights"),
        ({"model": "tinny"}, ValueError, "did you mean 'tiny'"),
        ({"model": "../no/such/folder"}, FileNotFoundError, "no model folder"),
    ],
)
def test_wrong_arguments_are_named(
    fields: dict[str, Any], error: type[Exception], message: str | None
) -> None:
    if message is None:  # torch.float is float32
        assert build(**fields)[0].dtype == torch.float32
        return
    with pytest.raises(error, match=message):
        build(**fields)


def test_fields_of_a_saved_model_can_be_replaced_but_not_its_sizes(saved_model: Path) -> None:
    model, _ = build(
        str(saved_model),
        model_overrides={"text_config": {"router_aux_loss_coef": 0.5}},
        dtype="bfloat16",
        attn_implementation="eager",
        experts_implementation="eager",
    )
    text_config = model.config.text_config
    assert text_config.router_aux_loss_coef == 0.5 and model.dtype == torch.bfloat16
    assert text_config._attn_implementation == text_config._experts_implementation == "eager"
    for wrong, message in (
        ({"router_aux_los": 1}, "did you mean 'router_aux_loss_coef'"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef"),
        ({"hidden_size": 64}, "are not those of"),
    ):
        with pytest.raises(ValueError, match=message):
            build(str(saved_model), model_overrides={"text_config": wrong})
    with pytest.raises(ValueError, match="`tokenizer` is for presets"):
        build(str(saved_model), model_overrides=None, tokenizer="x")


def test_a_model_of_another_type_is_refused(tmp_path: Path, saved_model: Path) -> None:
    for file in saved_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "llava"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json describes a Llava"):
        build(str(tmp_path))
