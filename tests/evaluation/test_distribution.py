from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusers_ext.evaluation.features import (
    coverage,
    distribution_metrics,
    diversity,
    feature_drift,
    frechet_distance,
    jensen_shannon,
    median_bandwidth,
    mmd,
    one_nearest_neighbour_accuracy,
    with_floor,
)


def normal(rows: int, dim: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator, dtype=torch.float64) + shift


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([[np.linalg.norm(x - y) for y in b] for x in a])


@pytest.mark.parametrize("rows", [40, 5])
def test_frechet_distance_equals_the_formula_with_a_matrix_root(rows):
    a, b = normal(rows, 8, 0), normal(rows + 2, 8, 1) * 1.7 + 0.3
    covariances = [np.cov(x.numpy(), rowvar=False) for x in (a, b)]
    # The eigenvalues of S_a S_b are those of S_a^{1/2} S_b S_a^{1/2}: real and not negative.
    eigenvalues = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item()
    expected += sum(map(np.trace, covariances)) - 2 * np.sqrt(eigenvalues).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_known_cases():
    a = normal(30, 4, 0)
    spread = a.var(0).sum().item()
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, a + 2) == pytest.approx(16)
    assert frechet_distance(a, 3 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(4 * spread)


def test_frechet_distance_is_biased_upwards_for_few_rows():
    few, many = (
        np.mean([frechet_distance(normal(n, 8, i), normal(n, 8, 50 + i)) for i in range(5)]) for n in (10, 1000)
    )
    assert few > 10 * many > 0


@pytest.mark.parametrize("bandwidth", [None, 0.4])
def test_mmd_equals_the_sums_over_pairs(bandwidth):
    a, b = normal(6, 3, 0), normal(5, 3, 1, shift=0.5)
    x, y = ((z / z.norm(dim=1, keepdim=True)).numpy() for z in (a, b))
    both = np.concatenate([x, y])
    pairs = distances(both, both)[np.triu_indices(11, 1)]
    s = bandwidth or np.median(pairs)

    def k(p: np.ndarray, q: np.ndarray) -> float:
        return np.exp(-((p - q) ** 2).sum() / (2 * s**2))

    expected = np.mean([k(p, q) for i, p in enumerate(x) for j, q in enumerate(x) if i != j])
    expected += np.mean([k(p, q) for i, p in enumerate(y) for j, q in enumerate(y) if i != j])
    expected -= 2 * np.mean([k(p, q) for p in x for q in y])
    assert mmd(a, b, bandwidth=bandwidth) == pytest.approx(expected, rel=1e-10)


def test_mmd_is_unbiased_and_grows_with_distance():
    same = [mmd(normal(20, 4, i), normal(20, 4, 100 + i)) for i in range(40)]
    assert min(same) < 0 < max(same)
    assert abs(np.mean(same)) < 0.01
    assert mmd(normal(20, 4, 0), normal(20, 4, 1, shift=1.0)) > 0.1
    assert mmd(normal(20, 4, 0, shift=9.0), normal(20, 4, 1, shift=-9.0)) > 0.7


def test_mmd_ignores_the_length_of_features():
    a, b = normal(8, 3, 0), normal(8, 3, 1)
    assert mmd(a, b) == pytest.approx(mmd(7 * a, b * torch.arange(1, 9)[:, None]))


def test_median_bandwidth_is_the_lower_median_of_normalised_distances():
    features = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    assert median_bandwidth(features) == pytest.approx(2**0.5)


def test_coverage_equals_its_definition():
    real, fake = normal(12, 2, 0), normal(9, 2, 1, shift=2.0)
    for k in (1, 3, 5):
        radii = np.sort(distances(real.numpy(), real.numpy()), axis=1)[:, k]
        expected = (distances(real.numpy(), fake.numpy()).min(axis=1) <= radii).mean()
        assert coverage(real, fake, k) == pytest.approx(expected)
        assert 0 < expected < 1


def test_coverage_of_known_cases():
    a = normal(200, 3, 0)
    assert coverage(a, a.flip(0)) == 1
    assert coverage(torch.ones(8, 2), torch.ones(3, 2)) == 1
    assert coverage(a, a + 100) == 0
    # Naeem et al.: the expectation for equal distributions and sizes is about 1 - 2^-k.
    found = np.mean([coverage(normal(200, 3, i), normal(200, 3, 90 + i), 2) for i in range(5)])
    assert found == pytest.approx(0.75, abs=0.04)


def test_one_nearest_neighbour_accuracy_equals_leave_one_out():
    a, b = normal(10, 2, 0), normal(7, 2, 1, shift=1.0)
    points, labels = torch.cat([a, b]).numpy(), np.arange(17) < 10
    matrix = distances(points, points)
    np.fill_diagonal(matrix, np.inf)
    expected = (labels[matrix.argmin(axis=1)] == labels).mean()
    assert one_nearest_neighbour_accuracy(a, b) == pytest.approx(expected)
    assert 0 < expected < 1


def test_one_nearest_neighbour_accuracy_of_known_cases():
    a = normal(300, 3, 0)
    assert one_nearest_neighbour_accuracy(a, normal(300, 3, 1)) == pytest.approx(0.5, abs=0.06)
    assert one_nearest_neighbour_accuracy(a, a + 100) == 1
    assert one_nearest_neighbour_accuracy(a, a.clone()) == 0
    # All points in one place: each of the others is as near.
    assert one_nearest_neighbour_accuracy(torch.ones(5, 2), torch.ones(5, 2)) == pytest.approx(4 / 9)


def test_jensen_shannon_of_known_cases():
    a = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    b = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert jensen_shannon(a, a) == 0
    # First dimension: (1/2, 1/2) against (1, 0); the second is constant and counts 0.
    entropy = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert jensen_shannon(a, b) == pytest.approx((entropy - 0.5) / 2)
    assert jensen_shannon(torch.zeros(4, 1), torch.ones(4, 1)) == pytest.approx(1)


def test_distribution_metrics_computes_in_float64_and_keeps_the_order_of_its_arguments():
    a, b = normal(9, 3, 0).float(), normal(7, 3, 1, shift=1.0).float()
    found = distribution_metrics(a, b, k=2)
    assert found["frechet_distance"] == frechet_distance(a.double(), b.double())
    assert found["mmd"] == mmd(a, b)
    assert found["coverage"] == coverage(a, b, 2) != coverage(b, a, 2)
    assert found["one_nearest_neighbour_accuracy"] == one_nearest_neighbour_accuracy(a, b)
    assert found["jensen_shannon"] == jensen_shannon(a, b)


def test_an_unchanged_model_scores_exactly_the_floor():
    base_a, base_b = normal(20, 4, 0), normal(20, 4, 1)
    for figure in with_floor(base_a, base_b, base_a.clone()).values():
        assert figure["tuned"] == figure["floor"]


def test_a_changed_model_is_above_the_floor_in_every_metric():
    base_a, base_b = normal(60, 4, 0, shift=1.0), normal(60, 4, 1, shift=1.0)
    found = with_floor(base_a, base_b, -3 * base_a)
    for name, figure in found.items():
        worse, better = figure["tuned"], figure["floor"]
        assert worse < better if name == "coverage" else worse > better, name
    bandwidth = median_bandwidth(torch.cat([base_a, base_b]))
    assert found["mmd"]["tuned"] == mmd(base_b, -3 * base_a, bandwidth=bandwidth)


@pytest.mark.parametrize("metric", [frechet_distance, mmd, coverage, one_nearest_neighbour_accuracy, jensen_shannon])
def test_bad_features_are_refused(metric):
    good = normal(10, 3, 0)
    broken = good.clone()
    broken[2, 1] = torch.nan
    with pytest.raises(ValueError, match="`b` must be finite, got NaN"):
        metric(good, broken)
    with pytest.raises(ValueError, match=r"`a` must be a tensor \(n, dim\), got \(10,\)"):
        metric(good[:, 0], good)
    with pytest.raises(ValueError, match=r"`b` must be a tensor \(n, dim\), got <class 'list'>"):
        metric(good, [[1.0]])
    with pytest.raises(ValueError, match="`a` and `b` must have one width, got 3 and 2"):
        metric(good, good[:, :2])
    with pytest.raises(ValueError, match="`a` and `b` must have . rows or more, got 10 and 0"):
        metric(good, good[:0])


def test_bad_settings_are_refused():
    a = normal(6, 3, 0)
    with pytest.raises(ValueError, match=r"`k` must be from 1 to .* \(5\), got 6"):
        coverage(a, a, 6)
    with pytest.raises(ValueError, match="`bandwidth` must be positive, got -1"):
        mmd(a, a, bandwidth=-1)
    with pytest.raises(ValueError, match="`bins` must be at least 2, got 1"):
        jensen_shannon(a, a, bins=1)
    with pytest.raises(ValueError, match="`features` must differ from one another"):
        mmd(torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"must have one shape, got \(6, 3\), \(5, 3\)"):
        with_floor(a, a[:5], a)
    with pytest.raises(ValueError, match="must have 2 rows or more, got 1 and 6"):
        frechet_distance(a[:1], a)


def test_feature_drift_is_half_of_one_minus_the_cosine():
    a, b = torch.randn(5, 7, generator=torch.manual_seed(0)), torch.randn(5, 7)
    expected = (1 - F.cosine_similarity(a.double(), b.double())) / 2
    assert torch.allclose(feature_drift(a, b), expected)
    assert feature_drift(a, a).tolist() == [0] * 5
    assert feature_drift(a, -3 * a).tolist() == pytest.approx([1] * 5)
    # Black pictures have no direction; two of them still are the same.
    assert feature_drift(torch.zeros(1, 3), torch.zeros(1, 3)).item() == 0


def test_diversity_is_the_mean_drift_over_pairs():
    features = torch.tensor([[1.0, 0], [0, 2.0], [-1.0, 0]])
    assert diversity(features) == pytest.approx((0.5 + 0.5 + 1) / 3)
