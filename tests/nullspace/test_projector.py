from __future__ import annotations

import pytest
import torch

from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.nullspace.projector import NullSpaceProjector, damped_projection, null_dimensions, project_rows
from diffusers_ext.nullspace.statistics import FeatureStatistics, Spectrum

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"
VALUES = torch.tensor([0.0, 1e-14, 0.1, 0.9, 9.0], dtype=torch.float64)
CRITERIA = [{"energy": 1e-3}, {"rank": 7}, {"threshold": 1e-2}, {"percentile": 30}]


def statistics_of(values: torch.Tensor, seed: int = 0) -> FeatureStatistics:
    """One Linear whose inputs have the given spectrum in random directions."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(noise).Q
    moment = SecondMoment.from_total((vectors * values) @ vectors.T * 50, 50)
    return FeatureStatistics({"q": moment}, {f"{LAYER}.to_q": "q"}, {})


def test_each_criterion_counts_from_the_smallest(subtests):
    for criterion, count in [
        ({"energy": 0}, 2),
        ({"energy": 0.0099}, 2),
        ({"energy": 0.0101}, 3),
        ({"energy": 0.11}, 4),
        ({"rank": 4}, 4),
        ({"rank": 5}, 5),
        ({"threshold": 0.05}, 2),
        ({"threshold": 0.9}, 3),
        ({"threshold": 100}, 5),
        ({"percentile": 59}, 2),
        ({"percentile": 60}, 3),
        ({"percentile": 100}, 5),
        ({"energy": 0, "floor": 0.02}, 3),
        ({"energy": 0, "floor": 0}, 1),
    ]:
        with subtests.test(criterion=criterion, count=count):
            assert null_dimensions(VALUES, **criterion) == count


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ({}, r"Exactly one of \['energy', 'rank', .*\] must be given, got none"),
        ({"rank": 1, "energy": 0}, r"got \['energy', 'rank'\]"),
        ({"energy": 1}, r"`energy` must be in \[0, 1\), got 1"),
        ({"energy": float("nan")}, r"`energy` must be in \[0, 1\), got nan"),
        ({"rank": 6}, "`rank` must be from 1 to the width 5, got 6"),
        ({"rank": 0}, "`rank` must be from 1 to the width 5, got 0"),
        ({"threshold": 0}, "`threshold` must be positive, got 0"),
        ({"percentile": 101}, r"`percentile` must be in \(0, 100\], got 101"),
        ({"percentile": 0}, r"`percentile` must be in \(0, 100\], got 0"),
    ],
)
def test_criteria_that_make_no_sense_are_refused(criterion, message):
    with pytest.raises(ValueError, match=message):
        null_dimensions(VALUES, **criterion)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_projectors_are_orthogonal_onto_the_least_used_directions(criterion):
    statistics = statistics_of(torch.logspace(-6, 1, 20, dtype=torch.float64))
    projector = NullSpaceProjector.from_statistics(statistics, **criterion)
    projection, basis = projector.projection(f"{LAYER}.to_q"), projector.basis(LAYER, "q")
    cut = projector.cuts["q"]
    assert basis.shape == (20, cut.dimensions)
    assert 0 < cut.dimensions < 20
    exact = {"rtol": 0, "atol": 1e-13}
    torch.testing.assert_close(projection, projection.T, **exact)
    torch.testing.assert_close(projection @ projection, projection, **exact)
    torch.testing.assert_close(basis.T @ basis, torch.eye(cut.dimensions).double(), **exact)
    torch.testing.assert_close(projection, basis @ basis.T, **exact)
    mean = statistics.moments["q"].mean
    share = (basis.T @ mean @ basis).trace() / mean.trace()
    assert cut.discarded_energy == pytest.approx(share.item(), rel=1e-6)
    values = torch.linalg.eigvalsh(mean)
    assert cut.discarded_energy == pytest.approx((values[: cut.dimensions].sum() / values.sum()).item())


def test_projected_updates_keep_the_outputs_on_preserved_inputs(few_statistics, digits):
    projector = NullSpaceProjector.from_statistics(few_statistics, energy=0)
    assert projector.cuts["text"].dimensions >= 128 - 3 * 16
    linear = digits.unet.get_submodule(f"{LAYER}.to_k")
    delta = torch.randn(linear.weight.shape, dtype=torch.float64)
    projected = projector.project(delta, LAYER, "k")
    torch.testing.assert_close(projected, delta @ projector.projection(f"{LAYER}.to_k"))
    mean = few_statistics.second_moment(LAYER, "k")
    moved = ((projected @ mean) * projected).sum() / ((delta @ mean) * delta).sum()
    assert moved < 1e-11
    assert projected.norm() > 0.5 * delta.norm()
    torch.testing.assert_close(projector.project(projected, LAYER, "k"), projected)


def test_projections_keep_shape_and_dtype():
    projection = torch.diag(torch.tensor([1.0, 0.0]))
    delta = torch.ones(3, 2, dtype=torch.bfloat16)
    projected = project_rows(delta, projection)
    assert projected.dtype == torch.bfloat16
    assert projected.tolist() == [[1, 0]] * 3
    with pytest.raises(ValueError, match=r"rows of width 2 .* got shape \(2, 3\)"):
        project_rows(delta.T, projection)


def test_damping_goes_from_the_null_space_to_everything():
    statistics = statistics_of(torch.tensor([0, 0, 1, 2, 4], dtype=torch.float64))
    spectrum = statistics.spectrum("q")
    hard = NullSpaceProjector.from_statistics(statistics, energy=0).projection(f"{LAYER}.to_q")
    identity = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(damped_projection(spectrum, 1e-8), hard, rtol=0, atol=1e-7)
    torch.testing.assert_close(damped_projection(spectrum, 1e9), identity, rtol=0, atol=1e-8)
    level = 0.1 * 7 / 5
    dense = level * torch.linalg.inv(statistics.moments["q"].mean + level * identity)
    torch.testing.assert_close(damped_projection(spectrum, 0.1), dense)
    damped = NullSpaceProjector.from_statistics(statistics, damping=0.1)
    torch.testing.assert_close(damped.projection(f"{LAYER}.to_q"), dense)
    with pytest.raises(ValueError, match="must not be asked of a damped projector"):
        damped.basis(LAYER, "q")


@pytest.mark.parametrize("damping", [0, -1.0, float("nan"), float("inf")])
def test_damping_must_be_positive(damping):
    spectrum = Spectrum(VALUES, torch.eye(5, dtype=torch.float64))
    with pytest.raises(ValueError, match=rf"`damping` must be positive.*, got {damping}"):
        damped_projection(spectrum, damping)


def test_damping_is_a_criterion_of_its_own(few_statistics):
    with pytest.raises(ValueError, match="`damping` must be given alone, got another criterion"):
        NullSpaceProjector.from_statistics(few_statistics, damping=1e-3, rank=2)
    with pytest.raises(ValueError, match="Exactly one of"):
        NullSpaceProjector.from_statistics(few_statistics)


@pytest.mark.parametrize("criterion", [{"energy": 0}, {"threshold": 1e-9}, {"percentile": 10}])
def test_an_empty_null_space_is_an_error_with_a_remedy(criterion):
    statistics = statistics_of(torch.tensor([1, 2, 5], dtype=torch.float64))
    message = (
        r"null space of 'q' must have at least one dimension, got none of 3 \(smallest eigenvalue: "
        r"0.1[23] of the energy\). Raise the limit, preserve fewer prompts"
    )
    with pytest.raises(ValueError, match=message):
        NullSpaceProjector.from_statistics(statistics, **criterion)


def test_linears_with_one_input_share_a_projection(few_statistics):
    projector = NullSpaceProjector.from_statistics(few_statistics, rank=3)
    projections = projector.projections()
    assert set(projections) == set(few_statistics.sources)
    assert len({id(projection) for projection in projections.values()}) == 1


def test_linears_without_a_statistic_are_refused(few_statistics):
    projector = NullSpaceProjector.from_statistics(few_statistics, rank=3)
    for ask in (
        lambda: projector.projection(f"{LAYER}.to_q"),
        lambda: projector.basis(LAYER, "q"),
        lambda: projector.project(torch.ones(1, 112), LAYER, "q"),
    ):
        with pytest.raises(ValueError, match=f"The projector must cover '{LAYER}.to_q', got none"):
            ask()


def test_compressed_statistics_give_nearly_the_same_null_space(few_statistics):
    full = NullSpaceProjector.from_statistics(few_statistics, rank=60)
    compressed = few_statistics.compress(1 - 1e-7)
    other = NullSpaceProjector.from_statistics(compressed, rank=60)
    overlap = full.basis(LAYER, "k").T @ few_statistics.second_moment(LAYER, "k")
    assert overlap.norm() < 1e-3
    mean = few_statistics.second_moment(LAYER, "k")
    basis = other.basis(LAYER, "k")
    assert (basis.T @ mean @ basis).trace() < 1e-6 * mean.trace()
