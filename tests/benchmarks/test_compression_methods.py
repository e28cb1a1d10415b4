"""The ways that compression is compared with, each against its closed form."""

from pathlib import Path

import numpy as np
import pytest
import torch
from compression import jobs, report, run
from compression_cases import model_and_processor, rows
from compression_methods import (
    UNITS,
    WEIGHTS,
    drop,
    largest,
    narrow,
    projected,
    rank_of,
    rewrite,
    stored_share,
    truncated,
    two_of_four,
)

from vlmoe.compression.banks import decoder_banks
from vlmoe.compression.calibration import calibrate

Tensor = torch.Tensor


def drawn(tokens: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(tokens)
    mixed = torch.randn(12, 12, dtype=torch.float64)
    inputs = torch.randn(tokens, 12, dtype=torch.float64) @ mixed
    return torch.randn(9, 12, dtype=torch.float64), inputs


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_projection_is_the_svd_whitened_by_cholesky(rank: int) -> None:
    """SVD-LLM: truncate W L, with the Cholesky factor L of the second moment, and undo L."""
    weight, inputs = drawn(50)
    factor = torch.linalg.cholesky(inputs.T @ inputs)
    expected = torch.linalg.solve_triangular(
        factor, truncated(weight @ factor, rank), upper=False, left=False
    )
    found = projected(weight, inputs, rank)
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


def test_the_projection_takes_fewer_tokens_than_features() -> None:
    """Cholesky has no factor there."""
    weight, inputs = drawn(5)
    assert torch.linalg.matrix_rank(inputs.T @ inputs) == 5
    found = projected(weight, inputs, 5)
    assert (inputs @ (found - weight).T).norm() < 1e-9 * (inputs @ weight.T).norm()


def test_zeros_and_ranks_are_as_many_as_said() -> None:
    weight = torch.randn(8, 16)
    halves = two_of_four(weight)
    assert (halves.unflatten(-1, (-1, 4)) != 0).sum(-1).unique().tolist() == [2]
    assert (halves.abs().sum() > weight.abs().sum() / 2).item()
    assert int((largest(weight, 0.25) != 0).sum()) == 32
    assert torch.linalg.matrix_rank(truncated(weight.double(), 3)) == 3
    assert rank_of(weight, 0.5) == 2
    assert stored_share("zeros", 0.5) == 1.0
    assert stored_share("2:4", 0.5) == pytest.approx(0.53125)


@pytest.mark.parametrize("method", UNITS)
def test_units_go_in_the_way_of_each_method(method: str) -> None:
    model, processor = model_and_processor("vlmoe")
    calibration = calibrate(model, processor, rows(), batch_size=6)
    before = decoder_banks(model)[0].experts
    gate_up, down = (before.get_parameter(n).clone() for n in ("gate_up_proj", "down_proj"))
    narrow(model, calibration, method, 8, seed=0)
    bank = decoder_banks(model)[0].experts
    assert bank.down_proj.shape[-1] == model.config.text_config.moe_intermediate_size == 8
    if method == "magnitude":
        norms = down.norm(dim=1) * gate_up[:, :24].norm(dim=-1) * gate_up[:, 24:].norm(dim=-1)
        kept = norms.topk(8).indices.sort(-1).values
        assert torch.equal(bank.down_proj[1], down[1][:, kept[1]])


@pytest.mark.parametrize("method", WEIGHTS)
def test_weights_that_keep_everything_stay(method: str) -> None:
    model, processor = model_and_processor("vlmoe")
    calibration = calibrate(model, processor, rows(), batch_size=6)
    ids = torch.randint(20, 90, (1, 7))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        rewrite(model, calibration, method, 1e9 if "svd" in method else 1.0, seed=0)
        after = model(input_ids=ids).logits
    is_exact = (after - before).abs().max() < 1e-4 * before.abs().max()
    assert bool(is_exact) == (method != "2:4")


def test_a_run_is_measured_once_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "demo" / "model", tmp_path / "out"
    model, processor = model_and_processor("vlmoe")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)

    class Data:
        calibration = calibrate(model, processor, rows(), batch_size=6)
        questions = rows(first=40)

    for job in (("none", 0, 0), ("surgeon", 8, 0), ("svd", 0.5, 0)):
        assert job in jobs(headline=False)
        run(folder, job, Data(), out)  # type: ignore[arg-type]
    table = report(out, tmp_path / "results.json")
    assert "| surgeon | 8 |" in table
    assert (tmp_path / "results.png").exists()
    flags = np.load(out / "demo" / "surgeon-8-0.npz")
    assert flags["after healing"].shape == (12,)
    monkeypatch.setattr("compression.load_model", None)
    run(folder, ("svd", 0.5, 0), Data(), out)  # type: ignore[arg-type]


def test_fewer_experts_by_every_criterion() -> None:
    for criterion in ("fisher", "reap", "random"):
        model, processor = model_and_processor("vlmoe")
        calibration = calibrate(model, processor, rows(), batch_size=6)
        drop(model, calibration, criterion, 3, seed=0)
        assert model.config.text_config.num_experts == 3
