"""`vlmoe merge` and `vlmoe export-lora`: the same model in another form, or one clear error."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from vlmoe import (
    VLMoEForConditionalGeneration,
    VLMoEProcessor,
    enable_routed_lora,
    expert_int8_config,
    expert_lora_config,
)
from vlmoe.lora.files import load_adapter
from vlmoe_cli import main

IDS = torch.arange(6, 20).view(2, 7)
WEIGHTS = "adapter_model.safetensors"


def adapted(base: Path, **options: Any) -> PeftModel:
    """Trained-looking: B is not zero."""
    model = VLMoEForConditionalGeneration.from_pretrained(base)
    model = get_peft_model(model, expert_lora_config(model, **options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    enable_routed_lora(model)
    return model.eval()


@pytest.fixture
def adapter(saved_model: Path, tmp_path: Path) -> Path:
    adapted(saved_model, r=3, attention=True).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_merged_model_has_the_adapters_logits_and_needs_no_adapter(
    saved_model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    assert main.main(["merge", str(adapter), "--output_dir", str(output)]) == 0
    assert f"Saved to {output}." in capsys.readouterr().out
    base = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    expected = PeftModel.from_pretrained(base, adapter).eval()(input_ids=IDS).logits
    merged = VLMoEForConditionalGeneration.from_pretrained(output)
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    base = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    assert not torch.allclose(base(input_ids=IDS).logits, expected, atol=1e-2)
    VLMoEProcessor.from_pretrained(output)
    assert not list(output.glob("adapter*"))


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def truncate(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def flip_header(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(bytes(byte ^ 255 for byte in data[:16]) + data[16:])


def other_number_of_experts(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    cut = {n: t[:6] if ".experts." in n and "lora_A" in n else t for n, t in tensors.items()}
    save_file({n: t.contiguous() for n, t in cut.items()}, folder / WEIGHTS)


def one_tensor_less(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(next(name for name in tensors if "experts" in name))
    save_file(tensors, folder / WEIGHTS)


def another_kind(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))


def no_number(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[next(name for name in tensors if "experts" in name)][1, 2] = float("inf")
    save_file(tensors, folder / WEIGHTS)


DAMAGES = {
    truncate: "is damaged: adapter_model.safetensors",
    flip_header: "is damaged: adapter_model.safetensors",
    other_number_of_experts: "is of another model: base_model.model.model.language_model",
    one_tensor_less: "has shape None, this model needs",
    another_kind: "holds an adapter of type IA3, not LORA",
    no_number: "model.safetensors: the tensor base_model.model.model.language_model",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_adapter_is_one_error_and_nothing_is_written(
    adapter: Path, tmp_path: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(adapter)
    output = tmp_path / "merged"
    assert main.main(["merge", str(adapter), "--output_dir", str(output)]) == 2
    assert DAMAGES[damage] in capsys.readouterr().err.splitlines()[-1]
    assert not output.exists()


@pytest.mark.parametrize("command", ["evaluate --dataset x", "generate what?", "train --dataset x"])
def test_an_adapter_is_not_taken_for_a_model(
    adapter: Path, command: str, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would load it onto its base, whatever tensors it lacks."""
    given = command.replace("x", str(data_folder)).split()
    options = ["--model", str(adapter)]
    if given[0] == "train":
        options += ["--output_dir", str(adapter.parent / "out")]
    assert main.main([*given, *options]) == 2
    assert "holds an adapter, no model: `vlmoe merge`" in capsys.readouterr().err


def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(
    saved_model: Path, adapter: Path
) -> None:
    model = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other_number_of_experts(adapter)
    with pytest.raises(ValueError, match="is of another model"):
        load_adapter(model, adapter)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_int8_experts_are_trained_on_but_their_adapter_is_merged_into_plain_ones(
    saved_model: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # TensorBoard's callback writes there after a finished run
    int8, folder, output = tmp_path / "int8", tmp_path / "adapter", tmp_path / "merged"
    VLMoEForConditionalGeneration.from_pretrained(
        saved_model, quantization_config=expert_int8_config()
    ).save_pretrained(int8)
    VLMoEProcessor.from_pretrained(saved_model).save_pretrained(int8)
    command = ["train", "--model", str(int8), "--dataset", str(data_folder), "--lora", "--use_cpu"]
    command += ["--output_dir", str(folder), "--max_steps", "2", "--learning_rate", "1e-2"]
    assert main.main([*command, "--eval_split", "test"]) == 0
    assert all(t.any() for n, t in load_file(folder / WEIGHTS).items() if "lora_B" in n)
    capsys.readouterr()
    assert main.main(["merge", str(folder), "--output_dir", str(output)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"experts of {int8} are quantized" in error and "--model" in error
    assert not output.exists()
    plain = ["--model", str(saved_model)]
    assert main.main(["merge", str(folder), "--output_dir", str(output), *plain]) == 0
    base = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    expected = PeftModel.from_pretrained(base, folder).eval()(input_ids=IDS).logits
    merged = VLMoEForConditionalGeneration.from_pretrained(output)
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "attention": True},
        {"experts": {"gate_up_proj": 4, "down_proj": 2}, "use_rslora": True},
        {"experts": ["down_proj"]},
        {"experts": ["gate_up_proj"], "r": 5},
    ],
    ids=str,
)
def test_exported_experts_have_the_same_updates_one_by_one(
    saved_model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = adapted(saved_model, **options)
    model.save_pretrained(tmp_path / "adapter")
    output = tmp_path / "per-expert"
    command = ["export-lora", str(tmp_path / "adapter"), "--output_dir", str(output)]
    assert main.main([*command, "--layout", "per-expert"]) == 0
    tensors = load_file(output / WEIGHTS)
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["target_parameters"] is None
    compared = 0
    for layer in range(3):
        name = f"model.language_model.layers.{layer}.mlp.experts"
        wrapper = model.get_submodule(f"base_model.model.{name}")
        while hasattr(wrapper, "parameter_name"):
            parameter = wrapper.parameter_name
            deltas = wrapper.get_delta_weight("default")
            leaves = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else ("down_proj",)
            for expert, delta in enumerate(deltas):
                for leaf, part in zip(leaves, delta.chunk(len(leaves)), strict=True):
                    key = f"base_model.model.{name}.{expert}.{leaf}.lora_"
                    a, b = tensors.pop(f"{key}A.weight"), tensors.pop(f"{key}B.weight")
                    scaling = scale(config, f"{name}.{expert}.{leaf}")
                    assert leaf in config["target_modules"]
                    torch.testing.assert_close(scaling * b @ a, part)
                    compared += 1
            wrapper = wrapper.base_layer
    sizes = {"gate_up_proj": 2, "down_proj": 1}
    assert compared == 3 * 4 * sum(sizes[name] for name in options.get("experts", sizes))
    assert not any(".experts." in name for name in tensors)
    assert any("q_proj" in name for name in tensors) == bool(options.get("attention"))


def scale(config: dict[str, Any], name: str) -> float:
    """As PEFT finds it."""
    from peft.utils.other import get_pattern_key

    rank, alpha = (
        config[f"{field}_pattern"].get(
            get_pattern_key(config[f"{field}_pattern"], name), config[default]
        )
        for field, default in (("rank", "r"), ("alpha", "lora_alpha"))
    )
    return alpha / (rank**0.5 if config["use_rslora"] else rank)


def test_an_unknown_layout_and_an_adapter_without_experts_are_refused(
    saved_model: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export-lora", str(adapter), "--output_dir", str(tmp_path / "out")]
    assert main.main([*command, "--layout", "fused"]) == 2
    assert "'fused' is not one of 'per-expert'" in capsys.readouterr().err
    tensors = {n: t for n, t in load_file(adapter / WEIGHTS).items() if ".experts." not in n}
    save_file(tensors, adapter / WEIGHTS)
    assert main.main(command) == 2
    assert "adapts no experts" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_training_with_lora_saves_an_adapter_that_resumes_and_merges(
    saved_model: Path,
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # TensorBoard's callback writes there after a finished run
    output, merged = tmp_path / "out", tmp_path / "merged"
    command = ["train", "--model", str(saved_model), "--dataset", str(data_folder), "--lora"]
    command += ["--lora_r", "2", "--lora_attention", "--lora_dropout", "0.1", "--use_cpu"]
    command += ["--output_dir", str(output), "--learning_rate", "1e-2", "--logging_steps", "1"]
    steps = ["--save_strategy", "steps", "--save_steps", "2", "--eval_split", "test"]
    assert main.main([*command, *steps, "--max_steps", "2"]) == 0
    assert {f.name for f in output.glob("*.safetensors")} == {WEIGHTS}
    for folder in (output, output / "checkpoint-2"):
        assert str(saved_model) not in (folder / "README.md").read_text()
        assert "pipeline_tag: image-text-to-text" in (folder / "README.md").read_text()
        assert (folder / WEIGHTS).stat().st_mode & 0o777 == 0o666 & ~umask()
    first = load_file(output / WEIGHTS)
    assert all(tensor.any() for name, tensor in first.items() if "lora_B" in name)
    resume = ["--resume_from_checkpoint", "last", "--max_steps", "4"]
    assert main.main([*command, *steps, *resume]) == 0
    results = json.loads((output / "train_results.json").read_text())
    assert results["resumed_at_step"] == 2 and results["steps"] == 4
    second = load_file(output / WEIGHTS)
    assert any(not torch.equal(second[name], tensor) for name, tensor in first.items())
    assert main.main([*command, *steps, *resume]) == 0  # nothing is left to do
    assert all(torch.equal(load_file(output / WEIGHTS)[n], t) for n, t in second.items())
    assert main.main(["merge", str(output), "--output_dir", str(merged)]) == 0
    base = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    expected = PeftModel.from_pretrained(base, output).eval()(input_ids=IDS).logits
    ours = VLMoEForConditionalGeneration.from_pretrained(merged)(input_ids=IDS).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_lora_on_a_preset_is_refused(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--model", "tiny", "--dataset", str(data_folder), "--lora", "--use_cpu"]
    assert main.main([*command, "--output_dir", str(tmp_path / "out")]) == 2
    assert "--lora adapts a saved model" in capsys.readouterr().err
