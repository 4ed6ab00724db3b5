"""The equations of an edit in closed form."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext.core.pipelines import denoiser_of
from diffusers_ext.nullspace import edit_equations
from diffusers_ext.nullspace.edit import edit_concept
from diffusers_ext.nullspace.edit_equations import (
    TargetRows,
    added_updates,
    edit_factors,
    effect_moments,
    layer_report,
    leading_directions,
    read_weight,
    target_rows,
)
from diffusers_ext.nullspace.edit_prompts import ConceptEdit, split_prompts
from diffusers_ext.nullspace.text_only import TextReader, text_only_linears, text_readers
from tests.tiny_current_pipelines import tiny_qwen_image_pipeline
from tests.tiny_digits import random_digits_pipeline

SOLVE = {"preserve_weight": 2.0, "eps": 1e-3, "kept": 1.0}


def tokens(seed: int = 0, dim: int = 6, free: int = 0, count: int = 40) -> tuple[TargetRows, torch.Tensor, ...]:
    """The targets' rows, `C0` and the preserved tokens."""
    generator = torch.Generator().manual_seed(seed)
    k0, k1, k2 = torch.randn(3, 40, dim, generator=generator, dtype=torch.float64)
    k0[:, dim - free :] = 0
    targets = TargetRows(*(x[:count] / count**0.5 for x in (k2 - k1, k1)))
    return targets, k0.T @ k0 / 40, k0


@pytest.mark.parametrize("count", [4, 40])  # fewer tokens than directions, and more
def test_the_update_minimises_its_objective(count):
    targets, c0, k0 = tokens(count=count)
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ridge = 1e-3 * targets.read.square().sum() / 6

    def objective(delta: torch.Tensor) -> torch.Tensor:
        edit = (targets.read @ delta.T - targets.change @ weight.T).square().sum()
        return edit + 2 * (k0 @ delta.T).square().sum() / 40 + ridge * delta.square().sum()

    b, a, _ = edit_factors(targets, c0, **SOLVE)
    assert len(a) == min(count, 6)
    delta = (weight @ b @ a).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(delta), delta)
    assert (gradient @ a.T).abs().max() < 1e-12  # along the directions
    if count == 40:
        assert gradient.abs().max() < 1e-12
        moments = targets.read.T @ targets.read + 2 * c0 + ridge * torch.eye(6)
        assert torch.allclose(b @ a, targets.change.T @ targets.read @ torch.linalg.inv(moments))


def test_a_hard_edit_is_zero_on_what_is_preserved():
    targets, c0, k0 = tokens(free=2)
    b, a, _ = edit_factors(targets, c0, **SOLVE, hard=True)
    assert (k0 @ a.T).abs().max() < 1e-12
    assert (targets.read @ a.T @ b.T).norm() > 0.1 * targets.change.norm()
    with pytest.raises(ValueError, match="`preserve` must leave directions free"):
        edit_factors(*tokens()[:2], **SOLVE, hard=True)


def test_more_edits_than_directions_are_refused():
    edit_factors(*tokens(free=2)[:2], **SOLVE, hard=True, edits=2)
    with pytest.raises(ValueError, match="one for each of 3 edits, got prompts that leave 2 of 6"):
        edit_factors(*tokens(free=2)[:2], **SOLVE, hard=True, edits=3)
    with pytest.raises(ValueError, match="`edits` must be at most as many as the text has directions, 6, got 7"):
        edit_factors(*tokens()[:2], **SOLVE, edits=7)


def test_a_system_whose_rounding_is_larger_than_its_ridge_is_solved():
    targets, _, _ = tokens(count=2)
    b, a, _ = edit_factors(targets, torch.zeros(6, 6, dtype=torch.float64), **{**SOLVE, "eps": 0.0})
    assert torch.allclose(targets.read @ a.T @ b.T, targets.change, atol=1e-4)
    with pytest.raises(ValueError, match="`pipeline` must read finite numbers"):
        edit_factors(targets, torch.full((6, 6), torch.nan, dtype=torch.float64), **SOLVE)


def test_the_smallest_rank_that_keeps_the_share_is_taken():
    effect = tokens()[0].change
    left, share = leading_directions(effect, 1.0)
    assert torch.allclose(effect @ left @ left.T, effect)
    assert share == pytest.approx(1)
    left, share = leading_directions(effect, 0.9)
    lost = effect - effect @ left @ left.T
    assert 1 - lost.square().sum() / effect.square().sum() == pytest.approx(share)
    assert share >= 0.9
    assert leading_directions(effect, share - 1e-9)[0].shape == left.shape


@pytest.mark.parametrize("kept", [0.9, 0.9999])
def test_few_directions_of_a_wide_edit_are_those_of_the_whole_decomposition(kept, monkeypatch):
    u, v = torch.randn(2, 60, 520, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    effect = (u.T * torch.logspace(0, -3, 60, dtype=torch.float64)) @ v
    whole = torch.linalg.eigh
    with monkeypatch.context() as patched:
        patched.setattr(torch.linalg, "eigh", lambda x: whole(x) if len(x) < 520 else pytest.fail("as a whole"))
        left, share = leading_directions(effect, kept)
    lost = effect - effect @ left @ left.T
    assert 1 - lost.square().sum() / effect.square().sum() == pytest.approx(share, abs=1e-9)
    assert share >= kept
    monkeypatch.setattr(edit_equations, "_WIDE", 1000)
    assert leading_directions(effect, kept)[0].shape == left.shape
    assert torch.allclose(left.T @ left, torch.eye(left.shape[1], dtype=torch.float64))


def test_a_wide_edit_of_many_directions_is_decomposed_as_a_whole():
    effect = torch.randn(520, 520, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, share = leading_directions(effect, 1.0)
    assert left.shape[1] > 500
    assert share == pytest.approx(1)


def test_the_report_of_a_layer_is_that_of_its_outputs():
    targets, c0, k0 = tokens()
    change, k1 = targets
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    b, a, _ = edit_factors(targets, c0, **{**SOLVE, "kept": 0.9})
    c2 = change.T @ change
    found = layer_report(weight.T @ weight, *effect_moments(b, a, targets, c2, c0), c2, c0)
    delta = weight @ b @ a
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
    targets, c0 = TargetRows(change / 40**0.5, k1 / 40**0.5), k0.T @ k0 / 200
    solve = {"preserve_weight": 1.0, "eps": 1e-6}
    b, a, share = edit_factors(targets, c0, kept=0.999, **solve)
    assert len(a) == 1
    assert share >= 0.999
    assert abs(a[0, 0]) > 0.9999

    def missed(matrix: torch.Tensor) -> float:
        return ((k1 @ matrix.T - change).square().sum() / change.square().sum()).item()

    def of_one_solve(weight: float) -> torch.Tensor:
        moments = targets.read.T @ targets.read + weight * c0
        ridge = 1e-6 * moments.diagonal().mean() * torch.eye(6, dtype=torch.float64)
        return targets.change.T @ targets.read @ torch.linalg.inv(moments + ridge)

    drift, of_one = ((k0 @ m.T).square().mean() for m in (b @ a, of_one_solve(1.0)))
    assert missed(b @ a) < 1e-3
    assert drift < of_one
    assert missed(of_one_solve(1e6)) > 10 * missed(b @ a)  # its size is what the second solve gives back


def test_padding_counts_as_no_token():
    pipeline = tiny_qwen_image_pipeline()
    reader = TextReader(pipeline, text_only_linears(pipeline), 8, {})
    source, prompts = next(iter(reader.readers)), ["a three", "a photo of the red three"]
    edits, _ = split_prompts([ConceptEdit("three", "nine", prompts=prompts)], ["a one"], False)
    targets, c2 = target_rows(text_readers(pipeline), reader, edits, source, {})
    texts = [reader.all([prompt], source)[0] for prompt in prompts]
    assert len(texts[0]) < len(texts[1])
    energy = sum(text.square().sum() for text in texts) / sum(map(len, texts))
    assert targets.read.square().sum() == pytest.approx(energy)
    assert targets.change.square().sum() == pytest.approx(c2.trace())


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
