"""Files under published names: as `save_pretrained` writes them, but for Qwen3-VL-MoE."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lock_holder import holder
from native_sparse import FAMILIES, sparse_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from vlmoe.hub.export import export, publish_layout, refuse_ambiguous_banks
from vlmoe.hub.published_layout import BANKS, published_views, saved_bank_shape
from vlmoe.hub.tensor_files import DTYPE_NAMES, StreamedTensor, write_tensors
from vlmoe_cli import main

WEIGHTS = "model.safetensors"


def write_from_views(model: PreTrainedModel, path: Path) -> None:
    """Write a model's file from its published views, expert by expert where there is a bank."""
    state, tensors = model.state_dict(), {}
    for name, view in published_views(model).items():

        def parts(view=view) -> Iterator[torch.Tensor]:  # type: ignore[no-untyped-def]
            source = state[view.source]
            if source.dim() < 3 or not view.source.endswith(BANKS):
                yield view.of(source)
            else:
                yield from (view.of_expert(e, source[e].clone()) for e in view.experts)

        tensors[name] = StreamedTensor(view.shape, view.dtype, parts)
    write_tensors(tensors, path, {"format": "pt"})


def assert_loads_equal(folder: Path, model: PreTrainedModel) -> None:
    vision = hasattr(model.config, "vision_config")
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    loaded = auto.from_pretrained(folder, dtype="auto").state_dict()
    own = model.state_dict()
    assert set(loaded) == set(own)
    for name, tensor in own.items():
        assert torch.equal(tensor, loaded[name]), name


@pytest.fixture(scope="module")
def qwen3_vl() -> PreTrainedModel:
    return sparse_model("qwen3_vl")


@pytest.fixture
def saved(qwen3_vl: PreTrainedModel, tmp_path: Path) -> Path:
    """A Qwen3-VL-MoE in several files, as transformers saves it."""
    qwen3_vl.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    return tmp_path / "saved"


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_those_of_save_pretrained(family: str, tmp_path: Path) -> None:
    model = sparse_model(family)
    model.save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "own")
    write_from_views(model, tmp_path / "own" / WEIGHTS)
    own, saved = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("own", "saved"))
    if family != "qwen3_vl":
        assert own == saved
    else:
        transposed = {
            name: tensor.mT.contiguous() if name.endswith(BANKS) else tensor
            for name, tensor in load_file(tmp_path / "saved" / WEIGHTS).items()
        }
        save_file(transposed, tmp_path / "expected", metadata={"format": "pt"})
        assert own == (tmp_path / "expected").read_bytes() != saved
    assert_loads_equal(tmp_path / "own", model)


def test_a_streamed_file_is_that_of_safetensors_to_the_byte(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(3.0), "none": torch.zeros(0, 3)}
    for place, dtype in enumerate(DTYPE_NAMES):
        tensors |= {f"{n}é{place}": torch.arange(6).reshape(3, 2).to(dtype) for n in "ba"}
    save_file(tensors, tmp_path / "whole", metadata={"format": "pt"})
    streamed = {
        name: StreamedTensor(tuple(t.shape), t.dtype, lambda t=t: t.split(1) if t.dim() else [t])
        for name, t in tensors.items()
    }
    write_tensors(streamed, tmp_path / "streamed", {"format": "pt"})
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_parts_of_a_wrong_size_or_dtype_leave_no_file(tmp_path: Path) -> None:
    for wrong in (torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)):
        tensor = StreamedTensor((2,), torch.float32, lambda wrong=wrong: [wrong])
        with pytest.raises(ValueError, match="weight"):
            write_tensors({"weight": tensor}, tmp_path / WEIGHTS, {})
    assert not list(tmp_path.iterdir())


def test_qwen3_vl_moe_is_rewritten_in_place_once(saved: Path, qwen3_vl: PreTrainedModel) -> None:
    assert publish_layout(saved) == 6
    for file in saved.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in filter(lambda name: name.endswith(BANKS), weights.keys()):
                experts, rows, columns = saved_bank_shape(qwen3_vl.config, name)
                assert weights.get_slice(name).get_shape() == [experts, columns, rows]
    assert_loads_equal(saved, qwen3_vl)
    times = {file: file.stat().st_mtime_ns for file in saved.iterdir()}
    assert publish_layout(saved) == 0
    assert times == {file: file.stat().st_mtime_ns for file in saved.iterdir()}


def test_a_folder_that_is_half_rewritten_loads(saved: Path, qwen3_vl: PreTrainedModel) -> None:
    shutil.copytree(saved, saved.parent / "whole")
    publish_layout(saved.parent / "whole")
    files = sorted(saved.glob("*.safetensors"))
    for file in files[::2]:
        shutil.copyfile(saved.parent / "whole" / file.name, file)
    assert_loads_equal(saved, qwen3_vl)
    assert 0 < publish_layout(saved) < 6


def test_other_families_are_left_as_they_are(tmp_path: Path) -> None:
    sparse_model("llama").save_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    assert publish_layout(tmp_path) == 0
    assert (tmp_path / WEIGHTS).read_bytes() == before
    with pytest.raises(ValueError, match="'mixtral', which save_pretrained writes"):
        export(tmp_path, tmp_path / "out")


def test_the_command_exports_the_model_and_not_its_training(
    saved: Path, qwen3_vl: PreTrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    (saved / "optimizer.pt").write_bytes(b"of training")
    (saved / "chat_template.jinja").write_text("{{ messages }}")
    before, out = {f.name: f.read_bytes() for f in saved.iterdir()}, saved.parent / "out"
    assert main.main(["export", str(saved), "--output_dir", str(out)]) == 0
    assert "6 banks" in capsys.readouterr().out
    assert {f.name for f in out.iterdir()} == set(before) - {"optimizer.pt"}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert_loads_equal(out, qwen3_vl)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before
    assert export(out, saved.parent / "again").banks == 0


def test_banks_that_are_their_transpose_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for field, width in (("moe_intermediate_size is 32", 32), ("twice the moe", 16)):
        model = sparse_model("qwen3_vl")
        model.config.text_config.moe_intermediate_size = width
        folder = tmp_path / str(width)
        type(model)(model.config).save_pretrained(folder)
        before = (folder / WEIGHTS).read_bytes()
        with pytest.raises(ValueError, match=f"{field}.*cannot tell a bank"):
            export(folder, tmp_path / "out")
        assert publish_layout(folder) == 0 and "Servers may read it wrongly" in caplog.text
        assert (folder / WEIGHTS).read_bytes() == before
        refuse_ambiguous_banks(folder)  # transformers 5 saved it
        fields = json.loads((folder / "config.json").read_text())
        fields["transformers_version"] = "4.57.0.dev0"
        (folder / "config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match="cannot be loaded"):
            refuse_ambiguous_banks(folder)


def test_a_damaged_bank_is_named(saved: Path) -> None:
    file = next(iter(sorted(saved.glob("*.safetensors"))))
    tensors = load_file(file)
    name = next((n for n in tensors if n.endswith(BANKS)), "model.x" + BANKS[0])
    save_file(tensors | {name: torch.zeros(4, 5, 6)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has the shape \(4, 5, 6\); allowed"):
        publish_layout(saved)


def test_what_cannot_be_exported_is_said(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        export(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="is the model itself"):
        export(saved, saved)
    with (
        holder(tmp_path / "out") as (process, _),
        pytest.raises(ValueError, match=f"being written to by process {process.pid}"),
    ):
        export(saved, tmp_path / "out")
    for file in saved.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no weights in safetensors"):
        export(saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()
