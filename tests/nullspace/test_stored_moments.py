"""Second moments from files: whoever alters them with fitting checksums is found by what they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.nullspace.statistics import FeatureStatistics

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


def saved(folder: Path, compressed: bool = False) -> Path:
    features = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = SecondMoment(4, compute_dtype=torch.float64).update(features)
    model = {"architecture": "a", "probe": [1.0]}
    facts = {"models": {"unet": model}, "prompts": ["p"], "settings": {}}
    statistics = FeatureStatistics({"text": moment}, {LINEAR: "text"}, facts)
    (statistics.compress(0.9) if compressed else statistics).save_pretrained(folder)
    return folder


def alter(folder: Path, change_config=None, change_tensors=None) -> None:
    """Change a folder and make its checksums fit."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    (change_config or (lambda c: None))(config)
    (change_tensors or (lambda t: None))(tensors)
    content = save(tensors)
    config |= {"sha256": hashlib.sha256(content).hexdigest()}
    config.pop("config_sha256")
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config))


def at(*keys, value):
    """Set one value of a nested config."""

    def change(config) -> None:
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


@pytest.mark.parametrize("compressed", [False, True])
def test_untouched_ones_are_read_also_without_the_newer_checksum(tmp_path, compressed):
    folder = saved(tmp_path, compressed)
    before = FeatureStatistics.from_pretrained(folder)
    alter(folder)
    after = FeatureStatistics.from_pretrained(folder)
    assert torch.equal(before.moments["text"].mean, after.moments["text"].mean)
    assert before.facts == after.facts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at("moments", value=[]), "`moments` must be an object, got list"),
        (at("moments", "text", value=3), "`moments.text` must hold `count`, and"),
        (at("moments", "text", "more", value=3), "`moments.text` must hold `count`, and"),
        (at("facts", value=None), "`facts` must be an object, got NoneType"),
        (at("sources", value=""), "`sources` must be an object, got str"),
        (at("sources", LINEAR, value=["text"]), "`sources` must point at given moments"),
        (at("sources", value={"a b": "text"}), "must hold dotted names of Linears, got 'a b'"),
        (at("more", value=1), r"\['more'\] that are unknown"),
        (at("facts", "prompts", value="p"), "`facts.prompts` must be a list"),
        (at("facts", "prompts", value=["p", 3]), "`facts.prompts` must be strings, got 3"),
        (at("facts", "models", "unet", value={}), "`facts.models.unet` must be a fingerprint"),
        (at("facts", "models", "unet", "probe", value=["x"]), "must be a fingerprint"),
        *(
            (at("moments", "text", "count", value=value), "count` must be an integer from 1, got")
            for value in (0, -1, 1.5, "10", True, None, 2**70)
        ),
        *(
            (at("moments", "text", "floor", value=value), "floor` must be a number from 0 to below 1")
            for value in (-1, 1, "0", None)
        ),
        (at("moments", "text", "floor", value=float("nan")), "must hold JSON, got: the number NaN"),
    ],
)
def test_altered_configs_are_refused(tmp_path, change, message):
    alter(saved(tmp_path), change)
    with pytest.raises(ValueError, match=message) as error:
        FeatureStatistics.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (torch.ones(4, 3), "'text' must be a square matrix"),
        (torch.ones(4), "'text' must be a square matrix"),
        (torch.zeros(0, 0), "'text' must be a square matrix"),
        (torch.ones(4, 4).long(), "'text.total' must be of a floating dtype, got torch.int64"),
        (torch.ones(4, 4).triu(), "'text' must be a symmetric matrix"),
        (-torch.eye(4), "'text' must be a symmetric matrix of squares"),
        (torch.full((4, 4), 5.0).fill_diagonal_(1), "'text' must have no negative eigenvalue"),
        (torch.ones(4, 4).fill_diagonal_(0), "'text' must be a symmetric matrix of squares"),
        (torch.full((4, 4), float("inf")), "model.safetensors must hold finite numbers"),
    ],
)
def test_matrices_that_are_no_second_moments_are_refused(tmp_path, total, message):
    alter(saved(tmp_path), None, lambda tensors: tensors.update({"text.total": total}))
    with pytest.raises(ValueError, match=message) as error:
        FeatureStatistics.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["text.values"].neg_(), "'text' must have no negative eigenvalue"),
        (lambda t: t["text.vectors"].mul_(2), "'text' must have orthonormal eigenvectors"),
        (lambda t: t.update({"text.values": torch.ones(9)}), "k eigenvalues, got"),
        (lambda t: t.update({"text.total": torch.ones(4, 4)}), r"\['text.total'\] that are unknown"),
        (lambda t: t.pop("text.values"), r"\['text.values'\] missing"),
    ],
)
def test_compressed_ones_are_looked_at_too(tmp_path, change, message):
    alter(saved(tmp_path, compressed=True), None, change)
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.from_pretrained(tmp_path)


def test_rounding_and_inputs_of_zeros_pass(tmp_path):
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    lean = (rows.T @ rows).double()  # of rank 3: the fourth eigenvalue is rounding
    for total in (lean - 1e-7 * torch.eye(4), torch.zeros(4, 4)):
        alter(saved(tmp_path), None, lambda tensors, total=total: tensors.update({"text.total": total}))
        assert torch.equal(FeatureStatistics.from_pretrained(tmp_path).moments["text"].total, total.double())


def with_spectra(folder: Path) -> Path:
    FeatureStatistics.from_pretrained(saved(folder)).store_spectra().save_pretrained(folder)
    return folder


def test_spectra_are_stored_on_request_and_not_computed_again(tmp_path, monkeypatch):
    plain = FeatureStatistics.from_pretrained(saved(tmp_path / "plain"))
    expected = plain.spectrum("text")
    plain.save_pretrained(tmp_path / "used")
    assert (tmp_path / "used/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    with_spectra(tmp_path / "stored")
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: pytest.fail("computed again"))
    loaded = FeatureStatistics.from_pretrained(tmp_path / "stored")
    assert all(map(torch.equal, loaded.spectrum("text"), expected))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_bytes() == (tmp_path / "stored/config.json").read_bytes()


@pytest.mark.parametrize("change", [lambda one, other: one.merge(other), lambda one, _: one.all_reduce()])
def test_statistics_that_change_forget_their_spectra(tmp_path, change):
    one = FeatureStatistics.from_pretrained(with_spectra(tmp_path / "one"))
    change(one, FeatureStatistics.from_pretrained(saved(tmp_path / "other")))
    one.save_pretrained(tmp_path / "changed")
    assert "spectra" not in json.loads((tmp_path / "changed/config.json").read_text())
    loaded = FeatureStatistics.from_pretrained(tmp_path / "changed")
    values, vectors = loaded.spectrum("text")
    torch.testing.assert_close((vectors * values) @ vectors.T, one.moments["text"].mean)


def scaled(name: str, factor: float):
    return lambda tensors: tensors[name].mul_(factor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scaled("text.eigenvalues", 1.001), "must have the eigendecomposition of its second moment, got one that"),
        (scaled("text.eigenvectors", 1.001), "must have the eigendecomposition of its second moment"),
        (scaled("text.eigenvalues", -1), "must have ascending eigenvalues from 0"),
        (lambda t: t.pop("text.eigenvalues"), r"got \['text.eigenvalues'\] missing"),
        (lambda t: t.update({"text.eigenvalues": torch.ones(3, dtype=torch.float64)}), "must have 4 eigenvalues and"),
        (lambda t: t.update({"text.eigenvectors": t["text.eigenvectors"].float()}), "in float64, got"),
    ],
)
def test_spectra_of_something_else_are_refused(tmp_path, change, message):
    folder = with_spectra(tmp_path)
    alter(folder, change_tensors=change)
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.from_pretrained(folder)


@pytest.mark.parametrize("value", ["text", ["none"], [["text"]], 3])
def test_names_of_spectra_are_those_of_moments(tmp_path, value):
    folder = with_spectra(tmp_path)
    alter(folder, at("spectra", value=value))
    with pytest.raises(ValueError, match="`spectra` must be a list of keys of moments, got"):
        FeatureStatistics.from_pretrained(folder)
