from __future__ import annotations

import pytest
import torch

from diffusers_ext.nullspace import directions as directions_module
from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.directions import (
    generalized_directions,
    leading_eigenpairs,
    null_directions,
    null_space_directions,
)
from diffusers_ext.nullspace.projector import NullSpaceProjector
from diffusers_ext.nullspace.statistics import TEXT, FeatureStatistics
from tests.nullspace.conftest import FEW_PROMPTS
from tests.tiny_digits import random_digits_pipeline

SUBJECT = {"expand_sub_phrases": False, "include_guidance_prompts": False}
EPS = 1e-4


@pytest.fixture(scope="module")
def subject() -> FeatureStatistics:
    return collect_statistics(random_digits_pipeline(), ["a photo of sks"], **SUBJECT)


def energies(vectors: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return ((vectors @ matrix) * vectors).sum(1)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_they_solve_the_generalised_eigenproblem(few_statistics, subject, rank):
    directions = null_space_directions(few_statistics, subject, rank, EPS)
    c_new, c_old = subject.moments[TEXT].mean, few_statistics.moments[TEXT].mean
    c_old = c_old + EPS * c_old.trace() / 128 * torch.eye(128, dtype=torch.float64)
    found = directions.sets[TEXT]
    assert found.vectors.shape == (rank, 128)
    residual = found.vectors @ c_new - found.ratios[:, None] * (found.vectors @ c_old)
    assert residual.abs().max() < 1e-9 * (found.vectors @ c_new).abs().max()
    torch.testing.assert_close(found.ratios, found.ratios.sort(descending=True).values)
    every = torch.linalg.eigvals(torch.linalg.solve(c_old, c_new)).real
    torch.testing.assert_close(found.ratios, every.sort(descending=True).values[:rank], rtol=1e-6, atol=0)


def test_they_are_scaled_to_unit_energy_of_the_subject(few_statistics, subject):
    projector = NullSpaceProjector.from_statistics(few_statistics, energy=1e-6)
    c_new, c_old = subject.moments[TEXT].mean, few_statistics.moments[TEXT].mean
    for cut in (None, projector):
        found = null_space_directions(few_statistics, subject, 4, projector=cut).sets[TEXT]
        ones = torch.ones(4, dtype=torch.float64)
        torch.testing.assert_close(energies(found.vectors, c_new), ones)
        torch.testing.assert_close(energies(found.vectors, c_old), found.old_energy)
        span = torch.linalg.qr(found.vectors.T).Q
        share = (span.T @ c_new @ span).trace() / c_new.trace()
        assert found.instance_share == pytest.approx(share.item())
        assert 0 < found.instance_share < 1


def test_rows_of_a_lora_have_the_old_energy_of_the_first(few_statistics, subject):
    directions = null_space_directions(few_statistics, subject, 4, EPS)
    c_old = few_statistics.moments[TEXT].mean
    c_old = c_old + EPS * c_old.trace() / 128 * torch.eye(128, dtype=torch.float64)
    rows = directions.vectors(few_statistics.linears[0])
    assert torch.equal(rows[0], directions.sets[TEXT].vectors[0])
    torch.testing.assert_close(energies(rows, c_old), energies(rows[:1], c_old).expand(4))


def test_null_directions_stay_in_the_basis_with_the_most_energy(few_statistics, subject):
    projector = NullSpaceProjector.from_statistics(few_statistics, energy=0)
    directions = null_space_directions(few_statistics, subject, 3, projector=projector)
    vectors = directions.sets[TEXT].vectors
    linear = few_statistics.linears[0]
    assert directions.vectors(linear) is vectors
    torch.testing.assert_close(vectors @ projector.projection(linear), vectors, rtol=0, atol=1e-11)
    basis, c_new = projector.basis_of(linear), subject.moments[TEXT].mean
    span = torch.linalg.qr(vectors.T).Q
    best = torch.linalg.eigvalsh(basis.T @ c_new @ basis)[-3:].sum()
    torch.testing.assert_close((span.T @ c_new @ span).trace(), best)
    assert (directions.sets[TEXT].old_energy.abs() < 1e-10).all()
    assert directions.kind == "null"


def test_small_eps_keeps_away_from_old_directions(few_statistics, subject):
    old = [
        null_space_directions(few_statistics, subject, 1, eps).sets[TEXT].old_energy.item()
        for eps in (1e-2, 1e-4, 1e-6)
    ]
    assert old[0] > 3 * old[1] > 9 * old[2] > 0


def test_the_report_has_a_row_per_matrix(few_statistics, subject):
    directions = null_space_directions(few_statistics, subject, 2)
    found = directions.sets[TEXT]
    assert directions.kind == "generalized"
    assert directions.sources == few_statistics.sources
    assert directions.report() == [
        {
            "matrix": TEXT,
            "linears": 14,
            "rank": 2,
            "largest_ratio": found.ratios[0].item(),
            "smallest_ratio": found.ratios[1].item(),
            "old_energy": found.old_energy.sum().item(),
            "instance_share": found.instance_share,
        }
    ]


def test_a_preserved_instance_prompt_is_refused(few_statistics):
    pipeline = random_digits_pipeline()
    subject = collect_statistics(pipeline, ["a photo of sks", FEW_PROMPTS[1]], **SUBJECT)
    with pytest.raises(ValueError, match="must not be a preserved one .*, got 'a blue one'. Use a"):
        null_space_directions(few_statistics, subject, 1)
    expanded = collect_statistics(pipeline, FEW_PROMPTS)
    subject = collect_statistics(pipeline, ["blue one"], **SUBJECT)
    null_space_directions(few_statistics, subject, 1)
    with pytest.raises(ValueError, match="must not be a preserved one .*, got 'blue one'"):
        null_space_directions(expanded, subject, 1)


def test_subjects_without_directions_of_their_own_are_refused(few_statistics):
    mean = few_statistics.moments[TEXT].mean
    message = r"must have directions that the preserved prompts do not use, got at most 1 times"
    with pytest.raises(ValueError, match=message):
        generalized_directions(mean, mean, 1, eps=1e-6)
    basis = NullSpaceProjector.from_statistics(few_statistics, energy=0).basis_of(few_statistics.linears[0])
    with pytest.raises(ValueError, match=r"got at most .*e-\d+ times their energy. Use a rarer token"):
        null_directions(mean, mean, basis, 1)


@pytest.mark.parametrize("hard", [False, True])
def test_more_directions_than_the_subject_uses_are_refused(few_statistics, subject, hard):
    cut = NullSpaceProjector.from_statistics(few_statistics, energy=0) if hard else None
    with pytest.raises(ValueError, match=r"`rank` must be at most (\d+), the directions") as error:
        null_space_directions(few_statistics, subject, 40, projector=cut)
    most = int(str(error.value).split("at most ")[1].split(",")[0])
    assert 4 <= most <= 16  # tokens of its one prompt
    found = null_space_directions(few_statistics, subject, most, projector=cut).sets[TEXT]
    assert found.vectors.abs().max() < 1e6
    assert found.vectors.float().isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "`rank` must be from 1 to the width 128, got 0"),
        ({"rank": 129}, "`rank` must be from 1 to the width 128, got 129"),
        ({"rank": 1, "eps": 0}, "`eps` must be positive, got 0"),
        ({"rank": 1, "eps": float("nan")}, "`eps` must be positive, got nan"),
    ],
)
def test_bad_arguments_are_refused(few_statistics, subject, arguments, message):
    with pytest.raises(ValueError, match=message):
        null_space_directions(few_statistics, subject, **arguments)


def test_ranks_beyond_the_null_space_are_refused(few_statistics, subject):
    projector = NullSpaceProjector.from_statistics(few_statistics, rank=3)
    with pytest.raises(ValueError, match="`rank` must be from 1 to the null dimension 3, got 4"):
        null_space_directions(few_statistics, subject, 4, projector=projector)
    damped = NullSpaceProjector.from_statistics(few_statistics, damping=1e-3)
    with pytest.raises(ValueError, match="must not be asked of a damped projector"):
        null_space_directions(few_statistics, subject, 1, projector=damped)


def test_statistics_that_do_not_belong_together_are_refused(few_statistics, subject):
    other = collect_statistics(random_digits_pipeline(1), ["a photo of sks"], **SUBJECT)
    with pytest.raises(ValueError, match="must be of the same text_encoder, got another one"):
        null_space_directions(few_statistics, other, 1)
    keys = collect_statistics(random_digits_pipeline(), ["sks"], features="k", **SUBJECT)
    with pytest.raises(ValueError, match=r"must cover the same Linears, got a difference in \['d"):
        null_space_directions(few_statistics, keys, 1)


def test_pure_functions_agree_with_a_diagonal_example():
    c_old = torch.diag(torch.tensor([1.0, 1.0, 0.0])).double()
    c_new = torch.diag(torch.tensor([4.0, 1.0, 9.0])).double()
    found = generalized_directions(c_new, c_old, 1, eps=0.03)  # level 0.02
    torch.testing.assert_close(found.ratios, torch.tensor([450.0]).double())
    torch.testing.assert_close(found.vectors.abs(), torch.tensor([[0, 0, 1 / 3]]).double())
    basis = torch.eye(3, dtype=torch.float64)[:, 2:]
    found = null_directions(c_new, c_old, basis, 1)
    torch.testing.assert_close(found.vectors.abs(), torch.tensor([[0, 0, 1 / 3]]).double())
    assert found.instance_share == pytest.approx(9 / 14)


def wide_moment(decay: float, seed: int, dim: int = 520) -> torch.Tensor:
    """A second moment whose eigenvalues fall by `decay` orders of magnitude, none of them alone."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    return (basis * torch.logspace(0, -decay, dim, dtype=torch.float64)) @ basis.T


def angle_between(first: torch.Tensor, second: torch.Tensor) -> float:
    """Sine of the largest angle between the spans of columns."""
    first, second = torch.linalg.qr(first).Q, torch.linalg.qr(second).Q
    return torch.linalg.matrix_norm(first - second @ (second.T @ first), 2).item()


@pytest.mark.parametrize("count", [1, 6])
def test_few_eigenvectors_of_a_wide_matrix_are_within_their_bound(count, monkeypatch):
    matrix = wide_moment(15, 0)
    values, vectors = torch.linalg.eigh(matrix)
    whole = torch.linalg.eigh
    small = lambda inner: whole(inner) if len(inner) < 520 else pytest.fail("decomposed as a whole")  # noqa: E731
    monkeypatch.setattr(torch.linalg, "eigh", small)
    found = leading_eigenpairs(matrix, count)
    torch.testing.assert_close(found.values, values.flip(0)[:count], rtol=1e-10, atol=0)
    assert 0 < found.angle <= 1e-8
    assert angle_between(found.vectors, vectors.flip(1)[:, :count]) <= found.angle + 1e-13 / (values[-1] - values[-2])


def test_eigenvalues_that_cannot_be_told_apart_are_computed_as_a_whole():
    matrix = wide_moment(6, 0)
    values, vectors = torch.linalg.eigh(matrix)
    values[-8:] = values[-8]  # the first three of eight equal ones
    matrix = (vectors * values) @ vectors.T
    found = leading_eigenpairs((matrix + matrix.T) / 2, 3)
    assert found.angle == 0
    assert torch.equal(found.values, torch.linalg.eigh((matrix + matrix.T) / 2).eigenvalues.flip(0)[:3])


def test_directions_of_wide_matrices_are_those_of_the_whole_decomposition(monkeypatch):
    c_old, c_new = wide_moment(3, 1), wide_moment(15, 2)
    basis = torch.linalg.eigh(c_old).eigenvectors  # of a null space wide enough
    for find in (
        lambda: generalized_directions(c_new, c_old, 2, EPS),
        lambda: null_directions(c_new, c_old, basis, 2),
    ):
        few = find()
        with monkeypatch.context() as patched:
            patched.setattr(directions_module, "_WIDE", 1000)
            whole = find()
        assert 0 < few.angle <= 1e-8
        assert whole.angle == 0
        torch.testing.assert_close(few.ratios, whole.ratios, rtol=1e-8, atol=0)
        assert angle_between(few.vectors.T, whole.vectors.T) < 1e-7
        torch.testing.assert_close(few.old_energy, whole.old_energy, rtol=1e-6, atol=0)


def test_the_report_names_the_angle_where_there_is_one():
    found = generalized_directions(wide_moment(15, 2), wide_moment(3, 1), 1, EPS)
    row = directions_module.NullSpaceDirections({TEXT: found}, {"a": TEXT}, "generalized").report()[0]
    assert row["largest_angle"] == found.angle > 0
