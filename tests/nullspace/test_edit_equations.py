"""The equations of an edit in closed form."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.nullspace import edit_equations
from diffusers_ext.nullspace.edit import edit_concept
from diffusers_ext.nullspace.edit_equations import (
    added_updates,
    edit_factors,
    edit_matrix,
    effect_moments,
    layer_report,
    low_rank,
    read_weight,
)
from diffusers_ext.nullspace.text_only import text_only_linears
from tests.tiny_digits import random_digits_pipeline


def moments(seed: int = 0, dim: int = 6, free: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    k0, k1, k2 = torch.randn(3, 40, dim, generator=generator, dtype=torch.float64)
    k0[:, dim - free :] = 0
    return k0, k1, k2, (k2 - k1).T @ k1 / 40, k1.T @ k1 / 40, k0.T @ k0 / 40


def test_the_matrix_minimises_its_objective():
    k0, k1, k2, d_c, c1, c0 = moments()
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def objective(delta: torch.Tensor) -> torch.Tensor:
        edit = (k1 @ delta.T - (k2 - k1) @ weight.T).square().sum() / 40
        kept = (k0 @ delta.T).square().sum() / 40
        return edit + 2 * kept + 1e-3 * c1.diagonal().mean() * delta.square().sum()

    delta = (weight @ edit_matrix(d_c, c1, c0, preserve_weight=2, eps=1e-3)).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(delta), delta)
    assert gradient.abs().max() < 1e-12


def test_a_hard_edit_is_zero_on_what_is_preserved():
    k0, k1, k2, d_c, c1, c0 = moments(free=2)
    matrix = edit_matrix(d_c, c1, c0, preserve_weight=1, eps=1e-6, hard=True)
    assert (k0 @ matrix.T).abs().max() < 1e-12
    assert (k1 @ matrix.T).norm() > 0.1 * (k2 - k1).norm()
    with pytest.raises(ValueError, match="`preserve` must leave directions free"):
        edit_matrix(*moments()[3:], preserve_weight=1, eps=1e-6, hard=True)


def test_more_edits_than_directions_are_refused():
    edit_matrix(*moments(free=2)[3:], preserve_weight=1, eps=1e-6, hard=True, edits=2)
    with pytest.raises(ValueError, match="one for each of 3 edits, got prompts that leave 2 of 6"):
        edit_matrix(*moments(free=2)[3:], preserve_weight=1, eps=1e-6, hard=True, edits=3)
    with pytest.raises(ValueError, match="`edits` must be at most as many as the text has directions, 6, got 7"):
        edit_matrix(*moments()[3:], preserve_weight=1, eps=1e-6, edits=7)


def test_the_smallest_rank_that_keeps_the_share_is_taken():
    *_, d_c, c1, c0 = moments()
    matrix = edit_matrix(d_c, c1, c0, preserve_weight=1, eps=1e-4)
    left, a, share = low_rank(matrix, c1, 1.0)
    assert torch.allclose(left @ a, matrix)
    assert share == pytest.approx(1)
    left, a, share = low_rank(matrix, c1, 0.9)
    lost = matrix - left @ a
    assert 1 - torch.trace(lost @ c1 @ lost.T) / torch.trace(matrix @ c1 @ matrix.T) == pytest.approx(share)
    assert share >= 0.9
    assert low_rank(matrix, c1, share - 1e-9)[1].shape == a.shape


@pytest.mark.parametrize("kept", [0.9, 0.9999])
def test_few_directions_of_a_wide_edit_are_those_of_the_whole_decomposition(kept, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    u, v, k1 = torch.randn(3, 60, 520, generator=generator, dtype=torch.float64)
    matrix, c1 = (u.T * torch.logspace(0, -3, 60, dtype=torch.float64)) @ v, k1.T @ k1 / 60
    whole = torch.linalg.eigh
    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "eigh", lambda x: whole(x) if len(x) < 520 else pytest.fail("as a whole"))
        left, a, share = low_rank(matrix, c1, kept)
    lost = matrix - left @ a
    assert 1 - torch.trace(lost @ c1 @ lost.T) / torch.trace(matrix @ c1 @ matrix.T) == pytest.approx(share, abs=1e-9)
    assert share >= kept
    monkeypatch.setattr(edit_equations, "_WIDE", 1000)
    assert low_rank(matrix, c1, kept)[1].shape == a.shape
    assert torch.allclose(left.T @ left, torch.eye(len(a), dtype=torch.float64))


def test_a_wide_edit_of_many_directions_is_decomposed_as_a_whole():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(520, 520, generator=generator, dtype=torch.float64)
    left, a, share = low_rank(matrix, torch.eye(520, dtype=torch.float64), 1.0)
    assert len(a) > 500
    assert share == pytest.approx(1)


def test_the_report_of_a_layer_is_that_of_its_outputs():
    k0, k1, k2, d_c, c1, c0 = moments()
    change = k2 - k1
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, a, _ = low_rank(edit_matrix(d_c, c1, c0, preserve_weight=1, eps=1e-4), c1, 0.9)
    c2 = change.T @ change / 40
    found = layer_report(weight.T @ weight, *effect_moments(left, a, d_c, c1, c2, c0), c2, c0)
    delta = weight @ left @ a
    missed = (k1 @ delta.T - change @ weight.T).square().sum() / (change @ weight.T).square().sum()
    assert found["achieved"] == pytest.approx(1 - missed.item())
    drift = (k0 @ delta.T).square().sum() / (k0 @ weight.T).square().sum()
    assert found["drift"] == pytest.approx(drift.item())


def test_a_targets_own_direction_takes_the_whole_edit():
    generator = torch.Generator().manual_seed(3)
    k0 = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    k0[:, 0] *= 1e-3  # what is preserved hardly uses the first direction
    k1 = k0[:40] + torch.eye(6, dtype=torch.float64)[0]
    change = torch.randn(6, generator=generator, dtype=torch.float64).expand(40, 6)
    d_c, c1, c0 = change.T @ k1 / 40, k1.T @ k1 / 40, k0.T @ k0 / 200
    solve = {"preserve_weight": 1.0, "eps": 1e-6}
    b, a, share = edit_factors(d_c, c1, c0, kept=0.999, **solve)
    assert len(a) == 1
    assert share >= 0.999
    assert abs(a[0, 0]) > 0.9999

    def missed(matrix: torch.Tensor) -> float:
        return ((k1 @ matrix.T - change).square().sum() / change.square().sum()).item()

    drift, of_one_solve = ((k0 @ m.T).square().mean() for m in (b @ a, edit_matrix(d_c, c1, c0, **solve)))
    assert missed(b @ a) < 1e-3
    assert drift < of_one_solve
    far = edit_matrix(d_c, c1, c0, **{**solve, "preserve_weight": 1e6})
    assert missed(far) > 10 * missed(b @ a)  # its size is what the second solve gives back


def test_added_updates_act_inside_and_leave_nothing():
    pipeline = random_digits_pipeline()
    unet = denoiser_of(pipeline)
    name = next(n for n, _ in unet.named_modules() if n.endswith("attn2.to_k"))
    linear, x = unet.get_submodule(name), torch.randn(2, 128)
    a, b = torch.randn(1, 128, dtype=torch.float64), torch.randn(linear.out_features, 1, dtype=torch.float64)
    before = linear(x)
    with added_updates(unet, {name: (a, b)}):
        assert torch.allclose(linear(x), before + x @ (b @ a).float().T, atol=1e-4)
    assert torch.equal(linear(x), before)
    with pytest.raises(RuntimeError, match="shapes"), added_updates(unet, {name: (a, b)}):
        linear(x[:, 1:])
    assert torch.equal(linear(x), before)


class Linear4bit(torch.nn.Linear):
    """Laid out as that of bitsandbytes: two numbers of 4 bits a byte in a column, one scale for 64 of them."""

    compute_dtype = torch.bfloat16

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        blocks = linear.weight.detach().reshape(-1, 8)
        self.scales = blocks.abs().amax(1, keepdim=True) / 7
        levels = ((blocks / self.scales).round() + 8).to(torch.uint8).reshape(-1, 2)
        packed = (levels[:, :1] << 4) | levels[:, 1:]
        self.weight, self.bias = torch.nn.Parameter(packed, requires_grad=False), linear.bias

    def dequantised(self) -> torch.Tensor:
        levels = torch.cat([self.weight >> 4, self.weight & 15], 1).reshape(-1, 8).float() - 8
        return (levels * self.scales).reshape(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (y if y is None else y.to(self.compute_dtype) for y in (self.dequantised(), self.bias))
        return torch.nn.functional.linear(x.to(self.compute_dtype), weight, bias).to(x)


def test_a_weight_that_cannot_be_read_is_told_by_what_it_computes():
    linear = torch.nn.Linear(24, 16)
    packed = Linear4bit(linear)
    assert packed.weight.shape == (24 * 16 // 2, 1)
    expected = packed.dequantised().bfloat16().double()
    assert torch.allclose(read_weight(packed), expected, atol=1e-2)
    packed.bias = None
    assert torch.equal(read_weight(packed), expected)
    packed.scales = packed.scales * torch.nan
    with pytest.raises(ValueError, match="must have Linears whose weights can be read, got a Linear4bit"):
        read_weight(packed)


def test_a_quantised_base_is_edited_as_the_weights_that_it_computes_with():
    quantised, plain = random_digits_pipeline(), random_digits_pipeline()
    for name in text_only_linears(plain):
        packed = Linear4bit(plain.unet.get_submodule(name))
        plain.unet.get_submodule(name).weight.data = packed.dequantised().bfloat16().float()
        quantised.unet.set_submodule(name, packed)
    edits = [edit_concept(pipeline, {"three": "nine"}, ["a red one"]) for pipeline in (quantised, plain)]
    assert [row["linear"] for row in edits[0].report.layers] == [row["linear"] for row in edits[1].report.layers]
    for key, tensor in edits[1].lora.items():
        assert torch.allclose(edits[0].lora[key], tensor, atol=1e-5)
