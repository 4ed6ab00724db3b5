from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from diffusers_ext.core.second_moment import LowRankMoment, SecondMoment
from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.statistics import TEXT, FeatureStatistics
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_pipelines import sdxl_pipeline

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"
SOURCES = {f"{LAYER}.to_v": TEXT, f"{LAYER}.to_k": TEXT, f"{LAYER}.to_q": "q"}


def made_up(seed: int = 0, **facts) -> FeatureStatistics:
    """Two matrices of widths 6 and 4, of 10 vectors each."""
    generator = torch.Generator().manual_seed(seed)
    moments = {
        key: SecondMoment(dim, compute_dtype=torch.float64).update(
            torch.randn(10, dim, generator=generator, dtype=torch.float64)
        )
        for key, dim in ((TEXT, 6), ("q", 4))
    }
    facts = {"models": {}, "prompts": [f"prompt {seed}"], "settings": {"seed": 0}, **facts}
    return FeatureStatistics(moments, dict(SOURCES), facts)


def same(first: FeatureStatistics, second: FeatureStatistics) -> bool:
    return (
        first.moments.keys() == second.moments.keys()
        and first.sources == second.sources
        and first.facts == second.facts
        and all(
            moment.mean.equal(second.moments[key].mean)
            and moment.count == second.moments[key].count
            and moment.floor == second.moments[key].floor
            for key, moment in first.moments.items()
        )
    )


@pytest.fixture(scope="module")
def pipeline():
    return random_digits_pipeline()


@pytest.fixture(scope="module")
def collected(pipeline) -> FeatureStatistics:
    return collect_statistics(pipeline, ["a red seven"], show_progress=False)


def test_what_is_in_it():
    statistics = made_up()
    assert statistics.linears == [f"{LAYER}.to_k", f"{LAYER}.to_q", f"{LAYER}.to_v"]
    assert statistics.layers == [LAYER]
    assert statistics.widths == {name: 4 if "to_q" in name else 6 for name in SOURCES}
    total = statistics.moments[TEXT].total
    torch.testing.assert_close(statistics.second_moment(LAYER, "k"), total / 10)
    with pytest.raises(ValueError, match=r"must cover 'x.to_out.0', got none .* 3 Linears"):
        statistics.second_moment("x", "out")
    with pytest.raises(ValueError, match=r"`sources` must point at given moments, .*\['gone'\]"):
        FeatureStatistics({}, {"a.to_k": "gone"}, {})


def test_a_report_takes_eigenvalues_alone_where_no_spectrum_is_there(monkeypatch):
    statistics, decomposed = made_up(), made_up()
    decomposed.store_spectra()
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: pytest.fail("eigenvectors"))
    for row, other in zip(statistics.report(), decomposed.report(), strict=True):
        assert row == pytest.approx(other)


def test_spectra_are_of_the_mean_and_follow_a_merge():
    statistics = made_up()
    for _ in range(2):
        values, vectors = statistics.spectrum(TEXT)
        mean = statistics.moments[TEXT].mean
        torch.testing.assert_close((vectors * values) @ vectors.T, mean)
        assert (values >= 0).all()
        statistics.merge(made_up(1))


def test_merge_adds_the_totals_exactly():
    first, second = made_up(0), made_up(1)
    totals = {key: first.moments[key].total + second.moments[key].total for key in first.moments}
    assert first.merge(second) is first
    for key, total in totals.items():
        assert first.moments[key].total.equal(total)
        assert first.moments[key].count == 20
    assert first.facts["prompts"] == ["prompt 0", "prompt 1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.facts["settings"].update(seed=1), r"settings \{'seed': 0\}, got \{'seed': 1"),
        (lambda o: o.sources.pop(f"{LAYER}.to_q"), "`other` must cover the same Linears"),
        (lambda o: o.moments.update(q=o.compress(0.9).moments["q"]), "must not be merged: merge"),
    ],
)
def test_merge_refuses_mismatches_and_adds_nothing(change, message):
    first, second = made_up(0), made_up(1)
    change(second)
    with pytest.raises(ValueError, match=message):
        first.merge(second)
    assert same(first, made_up(0))


def test_merge_refuses_other_models(pipeline, collected):
    other = collect_statistics(random_digits_pipeline(1), ["a red seven"], show_progress=False)
    with pytest.raises(ValueError, match="must be of the same text_encoder, got another one"):
        collected.merge(other)


def test_compress_keeps_the_trace_and_the_leading_directions(collected):
    compressed = collected.compress(energy=0.99)
    assert isinstance(collected.moments[TEXT], SecondMoment)
    moment, full = compressed.moments[TEXT], collected.moments[TEXT]
    kept = collected.report()[0]["dims_99"]
    assert moment.vectors.shape == (128, kept)
    torch.testing.assert_close(moment.mean.trace(), full.mean.trace(), rtol=1e-6, atol=0)
    lost = torch.linalg.norm(moment.mean - full.mean) / torch.linalg.norm(full.mean)
    assert 0 < lost < 0.01
    assert moment.count == full.count
    assert compressed.facts == {**collected.facts, "compressed_energy": 0.99}
    assert compressed.compress(0.5).moments[TEXT] is moment
    compressed.validate()
    for energy in (0, 1.1):
        with pytest.raises(ValueError, match=rf"`energy` must be in \(0, 1\], got {energy}"):
            collected.compress(energy)


def test_report_describes_every_matrix():
    spread = SecondMoment(4, compute_dtype=torch.float64)
    spread.update(torch.diag(torch.tensor([3.0, 1.0, 0.1, 0.0]).sqrt()))
    statistics = FeatureStatistics({"q": spread}, {f"{LAYER}.to_q": "q"}, {})
    (row,) = statistics.report()
    assert row == {
        "matrix": "q", "linears": 1, "dim": 4, "vectors": 4, "rank": 3, "dims_99": 3,
        "dims_99.9": 3, "trace": pytest.approx(4.1 / 4), "largest_share": pytest.approx(3 / 4.1),
    }  # fmt: skip


def test_validate_tells_what_the_design_documents_promise():
    """Symmetry, sign, conditioning and rank of every matrix, as numpy measures them."""
    vectors = torch.randn(40, 6, generator=torch.manual_seed(0), dtype=torch.float64)
    whole = SecondMoment(6, compute_dtype=torch.float64).update(vectors)
    flat = SecondMoment(6, compute_dtype=torch.float64).update(vectors[:3])
    sources = {f"{LAYER}.to_q": "whole", f"{LAYER}.to_k": "flat"}
    found = FeatureStatistics({"whole": whole, "flat": flat}, sources, {}).validate()
    assert found.keys() == {"whole", "flat"}
    assert found["whole"] == {
        "symmetric": True,
        "positive_semidefinite": True,
        "well_conditioned": True,
        "condition_number": pytest.approx(np.linalg.cond(whole.mean.numpy())),
        "rank": 6,
    }
    assert found["flat"]["condition_number"] > 1e12
    assert (found["flat"]["well_conditioned"], found["flat"]["rank"]) == (False, 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m.total[0, 0].fill_(float("nan")), "`text` must be finite"),
        (lambda m: m.total[0, 1].fill_(float("inf")), "`text` must be finite, got a matrix"),
        (lambda m: m.total[0, 1].add_(1), "`text` must be a symmetric matrix"),
        (lambda m: m.total[:2, :2].fill_(100).fill_diagonal_(1), "no negative eigenvalue, got -9"),
        (lambda m: setattr(m, "count", 0), "`text` must rest on at least one vector, got 0"),
    ],
)
def test_validate_finds_damage(damage, message):
    statistics = made_up()
    statistics.validate()
    damage(statistics.moments[TEXT])
    with pytest.raises(ValueError, match=message):
        statistics.validate()


def test_round_trip_is_exact(tmp_path, collected):
    for statistics in (collected, made_up(), collected.compress(0.9)):
        statistics.save_pretrained(tmp_path)
        assert same(FeatureStatistics.from_pretrained(tmp_path), statistics)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_truncated_and_altered_files_are_refused(tmp_path):
    made_up().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-8], content[:-1] + b"\x01"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="it is truncated or was altered"):
            FeatureStatistics.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda c: c.pop("sources"), r"The config of statistics must hold .*\['sources'\] missing"),
        (lambda c: c["moments"].update(v={"count": 1, "floor": 0}), r"must hold the tensors .*\['v.total'\] missing"),
        (lambda c: c["moments"]["q"].update(rest=0), "`moments.q` must hold `count`, and"),
        (lambda c: c["sources"].update({f"{LAYER}.to_k": "k"}), "must point at given moments, got 'k'"),
    ],
)
def test_altered_configs_are_refused(tmp_path, alter, message):
    made_up().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.pop("config_sha256")  # as before it was written, or by one who means it
    alter(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.from_pretrained(tmp_path)


def test_statistics_know_most_of_their_card(hub, collected):
    collected.push_to_hub("known", base_model="user/base", license="mit")
    card = ModelCard(hub.files("tester/known")["README.md"].decode())
    assert card.data.base_model == "user/base"
    assert "a red seven" in card.text
    assert "StableDiffusionPipeline" in card.text
    assert same(FeatureStatistics.from_pretrained("tester/known"), collected)
    with pytest.raises(ValueError, match="`base_model` must be given for the card, got None"):
        collected.push_to_hub("unknown", license="mit")


def test_all_reduce_in_one_process_changes_nothing():
    statistics = made_up()
    statistics.spectrum(TEXT)
    assert same(statistics.all_reduce(), made_up())


def test_pipelines_with_other_models_are_refused(pipeline, collected):
    collected.check_pipeline(pipeline)
    collected.check_pipeline(random_digits_pipeline().to(torch.bfloat16))
    with pytest.raises(ValueError, match="must be of the same text_encoder, got another one"):
        collected.check_pipeline(random_digits_pipeline(1))


def test_statistics_of_another_kind_of_pipeline_are_refused(pipeline, collected):
    xl = sdxl_pipeline()
    of_xl = collect_statistics(xl, ["a red seven"], show_progress=False)
    of_xl.check_pipeline(xl)
    del of_xl.facts["models"]["text_encoder"]
    with pytest.raises(ValueError, match="'text_encoder_2', which StableDiffusionPipeline lacks"):
        of_xl.check_pipeline(pipeline)
    # Some SD and SDXL models share the first text encoder; what differs is what K and V read.
    facts = {**collected.facts, "models": {}}
    shared = FeatureStatistics(collected.moments, collected.sources, facts)
    with pytest.raises(ValueError, match=r"got some of 'down_blocks.0.*, which it lacks"):
        shared.check_pipeline(xl)


def test_low_rank_moments_say_how_they_are_stored():
    moment = made_up().compress(0.5).moments[TEXT]
    assert isinstance(moment, LowRankMoment)
    assert moment.vectors.dtype == torch.float32


def test_merge_may_count_the_other_as_seen_several_times():
    first, second = made_up(0), made_up(1)
    total = first.moments[TEXT].total + 3 * second.moments[TEXT].total
    first.merge(second, times=3)
    torch.testing.assert_close(first.moments[TEXT].total, total, rtol=1e-15, atol=1e-15)
    assert first.moments[TEXT].count == 40
    assert same(second, made_up(1))
    with pytest.raises(ValueError, match="`times` must be at least 1, got 0"):
        first.merge(second, times=0)
