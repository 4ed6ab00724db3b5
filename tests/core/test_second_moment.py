from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_ext.core.second_moment import (
    LowRankMoment,
    SecondMoment,
    _split_product,
    exact_float32_matmul,
    gram,
    sampled_gram,
    split_gram,
)

ROOT = Path(__file__).parents[2]
# One process of two: it sees its own rows of a fixed stream and prints the reduced moment's error.
REDUCE = """
import sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
sys.argv[0] = "diffusers-ext"  # as on the console, without diffusers and PEFT
from diffusers_ext.core.second_moment import SecondMoment

rank, rendezvous = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method="file://" + rendezvous, rank=rank, world_size=2
)
rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
moment = SecondMoment(4).update(rows[:3] if rank == 0 else rows[3:]).all_reduce()
torch.distributed.destroy_process_group()
error = (moment.mean - rows.double().T @ rows.double() / 10).abs().max().item()
print(moment.count, error < 1e-6)
"""


def stream(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(features: torch.Tensor) -> torch.Tensor:
    rows = features.reshape(-1, features.shape[-1]).double()
    return rows.T @ rows / len(rows)


def test_mean_is_the_dense_second_moment():
    features = stream(3, 50, 8) + 2
    moment = SecondMoment(8)
    for batch in features:
        assert moment.update(batch) is moment
    assert moment.total.dtype == moment.mean.dtype == torch.float64
    assert moment.count == 150
    torch.testing.assert_close(moment.mean, dense(features), rtol=1e-6, atol=1e-6)
    assert moment.mean.diagonal().min() > 4


def test_float64_updates_are_exact():
    features = stream(40, 6).double() * torch.logspace(0, -8, 6, dtype=torch.float64)
    moment = SecondMoment(6, compute_dtype=torch.float64).update(features)
    torch.testing.assert_close(moment.mean, dense(features), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    features = stream(500, 8).to(dtype)
    moment = SecondMoment(8).update(features)
    torch.testing.assert_close(moment.mean, dense(features), rtol=1e-6, atol=1e-6)


def test_updates_keep_no_graph_and_any_shape():
    features = stream(2, 3, 4, 5).requires_grad_()
    moment = SecondMoment(5).update(features)
    assert moment.count == 24
    assert not moment.total.requires_grad


def test_merge_is_one_stream():
    features = stream(60, 5)
    parts = SecondMoment(5).update(features[:7]).merge(SecondMoment(5).update(features[7:]))
    whole = SecondMoment(5, compute_dtype=torch.float64).update(features)
    assert parts.count == whole.count == 60
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-6, atol=1e-6)


def test_total_can_be_taken_up_again():
    moment = SecondMoment(5).update(stream(60, 5))
    again = SecondMoment.from_total(moment.total, moment.count)
    assert again.dim == 5
    assert torch.equal(again.mean, moment.mean)


@pytest.mark.parametrize("precision", ["tf32", "ieee", "none"])
def test_precision_settings_come_back(precision):
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    try:
        settings[0].fp32_precision = precision
        before = [setting.fp32_precision for setting in settings]
        with exact_float32_matmul("cpu"):
            assert [setting.fp32_precision for setting in settings] == ["ieee", "ieee"]
        assert [setting.fp32_precision for setting in settings] == before
    finally:
        settings[0].fp32_precision = "none"
    assert torch.backends.cuda.matmul.allow_tf32 is False


def test_autocast_does_not_reach_the_products():
    features = stream(200, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gram(features)
    assert found.dtype == torch.float32
    assert torch.equal(found, gram(features))


def test_two_processes_reduce_to_one_stream(tmp_path):
    settings = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", REDUCE, str(rank), str(tmp_path / "rendezvous")],
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [process.communicate(timeout=280) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [output for output, _ in results] == ["10 True\n"] * 2, results


def test_reduction_of_a_single_process_changes_nothing():
    moment = SecondMoment(3).update(stream(4, 3))
    before = moment.mean
    assert torch.equal(moment.all_reduce().mean, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_value_that_is_not_finite_is_found(bad):
    moment = SecondMoment(4).update(stream(6, 4))
    moment.check_finite()
    features = stream(6, 4, seed=1)
    features[2, 3] = bad
    moment.update(features).update(stream(6, 4))
    with pytest.raises(ValueError, match=r"`attn2.to_k` must be finite, got .* trace (nan|inf)"):
        moment.check_finite("attn2.to_k")


def test_wrong_widths_are_errors():
    with pytest.raises(ValueError, match="`dim` must be at least 1, got 0"):
        SecondMoment(0)
    with pytest.raises(ValueError, match=r"must have width 4, got 5 \(shape \(2, 5\)\)"):
        SecondMoment(4).update(torch.ones(2, 5))
    with pytest.raises(ValueError, match="`other` must have width 4, got 5"):
        SecondMoment(4).merge(SecondMoment(5))
    with pytest.raises(ValueError, match="must have seen at least one vector"):
        _ = SecondMoment(4).mean


def decaying_moment(dim: int = 12) -> SecondMoment:
    return SecondMoment(dim, compute_dtype=torch.float64).update(stream(300, dim) * torch.logspace(0, -2, dim))


def test_full_energy_reproduces_the_moment():
    moment = decaying_moment()
    low_rank = LowRankMoment.from_moment(moment, energy=1.0)
    assert (low_rank.dim, low_rank.count) == (12, 300)
    torch.testing.assert_close(low_rank.mean, moment.mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_compression_keeps_the_trace_and_the_leading_directions(energy):
    moment = decaying_moment()
    low_rank = LowRankMoment.from_moment(moment, energy)
    kept = low_rank.vectors.shape[1]
    values, vectors = torch.linalg.eigh(moment.mean)
    assert low_rank.values.sum() >= energy * values.sum() > low_rank.values[:-1].sum()
    assert kept < 12
    torch.testing.assert_close(low_rank.mean.trace(), moment.mean.trace(), rtol=1e-6, atol=0)
    top = vectors[:, -kept:]
    torch.testing.assert_close(top.T @ low_rank.mean @ top, top.T @ moment.mean @ top, atol=1e-6, rtol=0)
    emptiest = vectors[:, 0]
    assert emptiest @ low_rank.mean @ emptiest > values[0]


def test_compressed_moment_that_is_not_finite_is_found():
    low_rank = LowRankMoment.from_moment(decaying_moment(), 0.9)
    low_rank.check_finite()
    low_rank.vectors[0, 0] = float("nan")
    with pytest.raises(ValueError, match="`text` must be finite, got a compressed moment"):
        low_rank.check_finite("text")


def test_exact_products_of_threads_that_overlap_leave_the_precision_as_it_was():
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    first, second = exact_float32_matmul("cpu"), exact_float32_matmul("cpu")
    first.__enter__()
    try:
        second.__enter__()
        first.__exit__(None, None, None)
        assert [setting.fp32_precision for setting in settings] == ["ieee"] * 2
    finally:
        second.__exit__(None, None, None)
    assert [setting.fp32_precision for setting in settings] == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wide_grams_are_computed_by_halves(dtype):
    features = stream(40, 1100).to(dtype)
    product = gram(features, dtype)
    torch.testing.assert_close(product, features.T @ features)


@pytest.mark.parametrize("dim", [24, 1100])
def test_split_products_err_by_no_more_than_what_they_leave_out(dim):
    features = stream(300, dim) * torch.logspace(0, -3, dim) + 0.5
    exact, sizes = features.double().T @ features.double(), features.double().abs()
    product = split_gram(features)
    assert product.dtype == torch.float32
    errors = (product.double() - exact).abs()
    assert (errors <= (3 * 2**-18 + 1e-6) * (sizes.T @ sizes)).all()
    assert 0 < torch.linalg.matrix_norm(product - exact, 2) < 1e-6 * torch.linalg.matrix_norm(exact, 2)
    half = features.bfloat16()
    torch.testing.assert_close(split_gram(half), gram(half), rtol=1e-6, atol=1e-6)  # of them nothing is left out


def test_split_moments_know_their_floor():
    features = stream(8, 100, 6)
    moment = SecondMoment(6, precision="bf16x3").update(features)
    assert moment.floor > SecondMoment(6).floor
    assert 0 < (moment.mean - dense(features)).norm() < moment.floor * dense(features).norm()
    sampled = SecondMoment(6, precision="bf16x3").sample(features, 1.0, torch.Generator())
    assert sampled.variance == 0
    assert (sampled.mean - dense(features)).norm() < moment.floor * dense(features).norm()


def test_sampled_grams_are_unbiased_and_know_their_error():
    features = stream(2, 32, 6) * torch.logspace(0, -1, 6) + 0.5
    exact = gram(features).double()
    drawn = [sampled_gram(features, 0.25, torch.Generator().manual_seed(seed)) for seed in range(400)]
    grams = torch.stack([one.gram.double() for one in drawn])
    errors = (grams - exact).square().sum((1, 2))
    # The mean of 400 has an error of a 400th of the squared one of each.
    assert (grams.mean(0) - exact).square().sum() < 3 * errors.mean() / 400
    assert sum(one.variance for one in drawn) / 400 == pytest.approx(errors.mean().item(), rel=0.1)
    assert errors.mean() > 0
    whole = sampled_gram(features, 1.0, torch.Generator())
    assert whole.variance == 0
    torch.testing.assert_close(whole.gram.double(), exact, rtol=1e-5, atol=1e-5)


def test_sampled_moments_tell_their_error_through_sums():
    features = stream(8, 100, 6)
    moments = [SecondMoment(6), SecondMoment(6)]
    for seed, batch in enumerate(features):
        moments[seed % 2].sample(batch, 0.25, torch.Generator().manual_seed(seed))
    both = moments[0].variance + moments[1].variance
    merged = moments[0].merge(moments[1])
    assert (merged.count, merged.variance) == (800, both)
    error = (merged.mean - dense(features)).norm() / dense(features).norm()
    assert error < 2 * merged.sampling_error < 0.5
    assert merged.repeated(3).sampling_error == pytest.approx(merged.sampling_error)
    assert SecondMoment(6).update(features).sampling_error == 0


def test_split_products_of_a_gpu_need_no_keyword_of_newer_torch(monkeypatch):
    """Tensors without data stand for those of a GPU; `mm` knows `out_dtype` from torch 2.8 on."""

    def mm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ y

    with FakeTensorMode():
        rows = torch.empty(8, 4, dtype=torch.bfloat16, device="cuda")
        assert _split_product(rows, rows).dtype == torch.float32
        monkeypatch.setattr(torch, "mm", mm)
        monkeypatch.setattr(torch.ops.aten.mm, "overloads", lambda: ["default", "out"])
        product = _split_product(rows, rows)
    assert (product.dtype, product.device.type) == (torch.float32, "cuda")
