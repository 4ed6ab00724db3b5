from __future__ import annotations

import pytest
import torch

from diffusers_ext import collect_statistics
from diffusers_ext.nullspace.debleed import (
    debleed_lora,
    preserved_energy,
    subject_projection,
    subject_projections,
)
from diffusers_ext.nullspace.lora import instance_statistics_like
from diffusers_ext.nullspace.lora_files import read_lora
from tests.nullspace.conftest import FEW_PROMPTS
from tests.nullspace.test_debleed import save_random_lora
from tests.tiny_digits import random_digits_pipeline


SUBJECT = ["a photo of the digit sks"]


def moments(seed: int = 0, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New and old vectors that share a direction, and an update."""
    generator = torch.Generator().manual_seed(seed)
    new, old, delta = (
        torch.randn(rows, dim, generator=generator, dtype=torch.float64) for rows in (2, 3, 4)
    )
    new[0] += old[0]
    return new, old, delta


@pytest.mark.parametrize("strictness", [0.1, 1.0, 50.0])
def test_it_is_the_least_squares_solution(strictness):
    new, old, delta = moments()
    c_new, c_old = new.T @ new / len(new), old.T @ old / len(old)
    projected = (delta @ subject_projection(c_new, c_old, strictness)).requires_grad_(True)
    level = 1e-4 * c_old.diagonal().mean()
    loss = (
        ((projected - delta) @ new.T).square().sum() / len(new)
        + strictness * (projected @ old.T).square().sum() / len(old)
        + strictness * level * projected.square().sum()
    )
    loss.backward()
    assert projected.grad.abs().max() < 1e-12


def test_a_subject_with_a_direction_of_its_own_is_kept_and_the_rest_is_not_touched():
    new, old, delta = moments()
    c_new, c_old = new.T @ new / 2, old.T @ old / 3
    projection = subject_projection(c_new, c_old, strictness=1e4)
    # Three old and two new vectors of six numbers: nothing has to be given up.
    torch.testing.assert_close(delta @ projection @ new.T, delta @ new.T, atol=2, rtol=0.3)
    assert (delta @ projection @ old.T).norm() < 1e-2 * (delta @ old.T).norm()
    loose = subject_projection(c_new, c_old, strictness=1e-6)
    torch.testing.assert_close(delta @ loose @ new.T, delta @ new.T, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("strictness", [0.0, -1.0, float("inf"), float("nan")])
def test_strictness_must_be_positive(strictness):
    with pytest.raises(ValueError, match="`strictness` must be positive, got"):
        subject_projection(torch.eye(2), torch.eye(2), strictness)


def test_a_lora_keeps_its_subject_and_loses_the_rest(few_statistics, tmp_path):
    pipeline = random_digits_pipeline()
    lora = save_random_lora(tmp_path, ("attn2.to_k", "attn2.to_v"))
    subject = instance_statistics_like(pipeline, few_statistics, SUBJECT)
    strict = debleed_lora(lora, few_statistics, instance_statistics=subject, strictness=100.0)
    loose = debleed_lora(lora, few_statistics, instance_statistics=subject, strictness=1e-3)
    energies = [
        [
            sum(preserved_energy(tensors, read).values())
            for tensors in (read_lora(lora), loose, strict)
        ]
        for read in (subject, few_statistics)
    ]
    (_, loose_subject, strict_subject), (old, loose_old, strict_old) = energies
    assert loose_subject == pytest.approx(energies[0][0], rel=0.05)
    assert strict_old < loose_old < old
    # Per unit of what it still does on the subject, it does less on what is preserved.
    assert strict_old / strict_subject < 0.2 * old / energies[0][0]
    read = debleed_lora(
        lora, few_statistics, pipeline=pipeline, instance_prompts=SUBJECT, strictness=100.0
    )
    assert all(tensor.equal(strict[key]) for key, tensor in read.items())


def test_bad_input(few_statistics, tmp_path):
    pipeline = random_digits_pipeline()
    lora = save_random_lora(tmp_path, ("attn2.to_k", "attn2.to_v"))
    with pytest.raises(ValueError, match="`pipeline` must be given to read `instance_prompts`"):
        debleed_lora(lora, few_statistics, instance_prompts=SUBJECT)
    with pytest.raises(ValueError, match="must be given, got none or several"):
        debleed_lora(lora, few_statistics, pipeline=pipeline, instance_prompts=SUBJECT, damping=1.0)
    repeated = instance_statistics_like(pipeline, few_statistics, FEW_PROMPTS[:1])
    with pytest.raises(ValueError, match="An instance prompt must not be a preserved one"):
        subject_projections(few_statistics, repeated, 10.0)
    fewer = collect_statistics(pipeline, SUBJECT, features="k", show_progress=False)
    with pytest.raises(ValueError, match="Both statistics must cover the same Linears"):
        subject_projections(few_statistics, fewer, 10.0)
