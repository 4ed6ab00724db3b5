from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusers_ext.core.second_moment import SecondMoment
from diffusers_ext.nullspace import npy_tree as layout
from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.npy_tree import export_layout, in_bytes, layout_size, load_layout, safe_name
from diffusers_ext.nullspace.statistics import FeatureStatistics
from tests.tiny_digits import random_digits_pipeline

PROMPTS = ["a red seven", "a blue one"]
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def pipeline():
    return random_digits_pipeline()


@pytest.fixture(scope="module")
def statistics(pipeline) -> FeatureStatistics:
    return collect_statistics(
        pipeline,
        PROMPTS,
        features=("q", "k", "v", "out", "attn1.q", "ff.in"),
        layers=[0, 1],
        num_inference_steps=2,
        show_progress=False,
    )


def matrix_of(rank: int, dim: int = 56, seed: int = 0) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(dim, rank))
    return (factor @ factor.T / rank).astype(np.float32)


def write_step(run: Path, step: str, matrix: np.ndarray, n_samples: int, *, slot: str = "q", **metadata) -> Path:
    """One matrix as another program writes it: `<step>/<layer>/`, without our own keys."""
    folder = run / step / safe_name(LAYER)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{slot}_covariance.npy", matrix)
    metadata = {"n_samples": n_samples, "feature_dim": len(matrix), **metadata}
    (folder / f"{slot}_metadata.json").write_text(json.dumps(metadata))
    return folder / f"{slot}_covariance.npy"


def test_round_trip_keeps_the_matrices_to_float32_rounding(tmp_path, statistics):
    run = statistics.export_layout(tmp_path, show_progress=False)
    loaded = FeatureStatistics.from_layout(tmp_path, show_progress=False)
    assert run.parent == tmp_path
    assert loaded.sources == statistics.sources
    assert len(loaded.moments) == 9  # text, and q, out, attn1 and ff of two layers
    for key, moment in statistics.moments.items():
        assert loaded.moments[key].count == moment.count
        largest = moment.mean.abs().max().item()
        torch.testing.assert_close(loaded.moments[key].mean, moment.mean, rtol=0, atol=1e-7 * largest)


def test_round_trip_keeps_prompts_and_fingerprints(tmp_path, statistics, pipeline):
    export_layout(statistics, tmp_path, show_progress=False)
    loaded = load_layout(tmp_path, denoiser=pipeline.unet, show_progress=False)
    assert loaded.facts["prompts"] == PROMPTS
    assert loaded.facts["models"] == statistics.facts["models"]
    added = {"imported_from_layout": True, "centred": False, "timesteps": [0]}
    assert loaded.facts["settings"] == {**statistics.facts["settings"], **added}
    with pytest.raises(ValueError, match="must be of the same denoiser"):
        load_layout(tmp_path, denoiser=random_digits_pipeline(1).unet, show_progress=False)


def test_tree_has_the_documented_names_and_contents(tmp_path, statistics):
    run = export_layout(statistics, tmp_path, threshold=2e-2, show_progress=False)
    assert re.fullmatch(r"run_\d{8}_\d{6}", run.name)
    folder = run / "timestep_0000" / "down_blocks_0_attentions_0_transformer_blocks_0_attn2"
    covariance = np.load(folder / "k_covariance.npy")
    projection = np.load(folder / "k_projection.npy")
    metadata = json.loads((folder / "k_metadata.json").read_text())
    expected = statistics.second_moment(LAYER, "k").numpy()
    assert covariance.dtype == projection.dtype == np.float32
    np.testing.assert_array_equal(covariance, expected.astype(np.float32))
    singular_values = np.linalg.svd(expected, compute_uv=False)
    np.testing.assert_allclose(metadata["singular_values"], singular_values, rtol=0, atol=1e-12)
    null_space_dim = int((singular_values < 2e-2).sum())
    assert 0 < null_space_dim < 128
    assert metadata["null_space_dim"] == null_space_dim
    assert np.trace(projection) == pytest.approx(null_space_dim, rel=1e-5)
    np.testing.assert_allclose(projection @ projection, projection, atol=1e-5)
    assert np.linalg.norm(expected @ projection, 2) < 2e-2 + 1e-5
    assert metadata["original_shape"] == [metadata["n_samples"], 128]
    assert (metadata["feature_dim"], metadata["nullspace_threshold"]) == (128, 2e-2)
    assert (metadata["actual_timestep"], metadata["layer"]) == (0, LAYER)
    assert (metadata["centred"], metadata["pooled"]) == (False, True)


def test_no_projection_is_written_without_null_dimensions(tmp_path):
    moment = SecondMoment(8).update(torch.randn(100, 8, generator=torch.manual_seed(0)))
    facts = {"models": {}, "prompts": [], "settings": {}}
    full = FeatureStatistics({"one": moment}, {f"{LAYER}.to_q": "one"}, facts)
    run = export_layout(full, tmp_path, show_progress=False)
    folder = run / "timestep_0000" / safe_name(LAYER)
    assert sorted(path.name for path in folder.iterdir()) == ["q_covariance.npy", "q_metadata.json"]
    assert json.loads((folder / "q_metadata.json").read_text())["null_space_dim"] == 0


def test_copies_for_several_timesteps_count_once(tmp_path, statistics):
    run = export_layout(statistics, tmp_path, timesteps=[20, 980], show_progress=False)
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["timestep_0020", "timestep_0980"]
    loaded = load_layout(run, show_progress=False)
    assert loaded.moments["text"].count == statistics.moments["text"].count
    assert loaded.facts["settings"]["timesteps"] == [20, 980]
    altered = run / "timestep_0980" / safe_name(LAYER) / "v_covariance.npy"
    np.save(altered, np.load(altered) * 2)
    with pytest.raises(ValueError, match="v_covariance.npy must repeat the matrix 'text'"):
        load_layout(run, show_progress=False)


def test_links_name_the_timesteps_by_their_order(tmp_path, statistics):
    run = export_layout(statistics, tmp_path, timesteps=[980, 20], step_links=True, show_progress=False)
    names = {path.name: path.resolve().name for path in run.glob("step_*")}
    assert names == {"step_000": "timestep_0980", "step_001": "timestep_0020"}
    loaded = load_layout(run, show_progress=False)
    assert loaded.facts["settings"]["timesteps"] == [20, 980]
    run.rename(tmp_path / "moved")
    assert (tmp_path / "moved/step_000" / safe_name(LAYER) / "q_covariance.npy").is_file()


def test_the_size_is_what_is_written(tmp_path, statistics, caplog):
    caplog.set_level("INFO")
    run = export_layout(statistics, tmp_path, timesteps=[1, 2, 3], show_progress=False)
    size = sum(path.stat().st_size for path in run.rglob("*.npy"))
    assert f"takes {in_bytes(size)} for 3 timesteps" in caplog.text
    assert 0 < size <= 3 * layout_size(statistics.widths)


def test_a_tree_that_does_not_fit_is_not_begun(tmp_path, statistics, monkeypatch):
    usage = SimpleNamespace(free=10_000)
    monkeypatch.setattr(layout.shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ValueError, match=r"`directory` must have .* kB free .* got 10 kB in "):
        export_layout(statistics, tmp_path / "new", show_progress=False)
    assert not (tmp_path / "new").exists()


def test_compressed_statistics_are_written_in_full(tmp_path, statistics):
    compressed = statistics.compress(0.99)
    export_layout(compressed, tmp_path, show_progress=False)
    loaded = load_layout(tmp_path, show_progress=False)
    expected = compressed.second_moment(LAYER, "out")
    torch.testing.assert_close(loaded.second_moment(LAYER, "out"), expected, rtol=0, atol=1e-6)


def test_an_interrupted_export_leaves_nothing(tmp_path, statistics, monkeypatch):
    write, written = layout.write_atomically, []

    def break_down(path, content):
        written.append(path)
        if len(written) == 5:
            raise OSError("No space left on device")
        write(path, content)

    monkeypatch.setattr(layout, "write_atomically", break_down)
    with pytest.raises(OSError, match="No space left"):
        export_layout(statistics, tmp_path, show_progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run_name": "../run_1"}, "`run_name` must be a folder name starting with 'run_'"),
        ({"run_name": "mine"}, "`run_name` must be a folder name starting with 'run_', got 'mine'"),
        ({"run_name": "run_here"}, "`run_name` must be new, got 'run_here'"),
        ({"timesteps": []}, "`timesteps` must be different and not negative"),
        ({"timesteps": [1, 1]}, r"`timesteps` must be different and not negative, got \[1, 1\]"),
        ({"timesteps": [-1]}, "`timesteps` must be different and not negative"),
        ({"threshold": 0.0}, "`threshold` must be positive"),
    ],
)
def test_unfit_export_arguments_are_refused(tmp_path, statistics, arguments, message):
    (tmp_path / "run_here").mkdir()
    with pytest.raises(ValueError, match=message):
        export_layout(statistics, tmp_path, show_progress=False, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["run_here"]


def test_layers_whose_folders_would_coincide_are_refused(tmp_path):
    moment = SecondMoment(2).update(torch.eye(2))
    sources = {"a.b_c.attn2.to_q": "one", "a_b.c.attn2.to_q": "one"}
    facts = {"models": {}, "prompts": [], "settings": {}}
    with pytest.raises(ValueError, match=r"different folders, got several for \['a_b_c_attn2'\]"):
        export_layout(FeatureStatistics({"one": moment}, sources, facts), tmp_path)


@pytest.mark.parametrize("step", ["timestep_{:04d}", "step_{:03d}"])
def test_timesteps_are_pooled_by_their_numbers_of_vectors(tmp_path, pipeline, step):
    first, second = matrix_of(60, seed=1), matrix_of(60, seed=2)
    write_step(tmp_path / "run_a", step.format(20), first, 100, centred=False)
    write_step(tmp_path / "run_a", step.format(40), second, 300, centred=False)
    loaded = load_layout(tmp_path, denoiser=pipeline.unet, show_progress=False)
    expected = (first.astype(np.float64) + 3 * second.astype(np.float64)) / 4
    assert loaded.moments[f"{LAYER}.to_q"].count == 400
    np.testing.assert_allclose(loaded.second_moment(LAYER, "q").numpy(), expected, rtol=1e-6, atol=1e-7)
    assert loaded.facts["settings"]["timesteps"] == [20, 40]
    assert list(loaded.facts["models"]) == ["denoiser"]


@pytest.mark.parametrize("prefix", ["", "module_"])
@pytest.mark.parametrize("keys", [("timestep_0020", "timestep_0980"), ("alpha_00_0980", "alpha_01_0020")])
def test_flat_trees_are_read(tmp_path, pipeline, prefix, keys):
    folder = tmp_path / "covariance_matrices" / f"{prefix}{safe_name(LAYER)}"
    folder.mkdir(parents=True)
    for slot, dim in (("k", 128), ("out", 56)):
        for key in keys:
            np.save(folder / f"{key}_{slot}_cov.npy", matrix_of(200, dim))
            metadata = {"n_samples": 10, "feature_dim": dim, "singular_values": None}
            (folder / f"{key}_{slot}_metadata.json").write_text(json.dumps(metadata))
    loaded = load_layout(tmp_path, denoiser=pipeline.unet, allow_centred=True, show_progress=False)
    assert loaded.linears == [f"{LAYER}.to_k", f"{LAYER}.to_out.0"]
    assert loaded.moments[f"{LAYER}.to_k"].count == 20
    settings = loaded.facts["settings"]
    assert settings == {"imported_from_layout": True, "centred": True, "timesteps": [20, 980]}


def test_centred_covariances_are_refused_with_the_reason(tmp_path, pipeline):
    write_step(tmp_path, "timestep_0020", matrix_of(60), 100)
    with pytest.raises(ValueError, match=r"must be uncentred .* adds a constant to every output"):
        load_layout(tmp_path, denoiser=pipeline.unet, show_progress=False)


def test_covariances_of_per_head_outputs_are_refused(tmp_path, pipeline):
    write_step(tmp_path, "timestep_0020", matrix_of(60, dim=14), 100, slot="v")
    message = r"inputs of .*attn2.to_v \(width 128\), got width 14. Output features, often per head"
    for allow_centred in (False, True):
        with pytest.raises(ValueError, match=message):
            load_layout(tmp_path, denoiser=pipeline.unet, allow_centred=allow_centred)


def test_a_layer_that_lacks_a_timestep_is_refused(tmp_path, pipeline):
    for step in ("timestep_0020", "timestep_0040"):
        write_step(tmp_path, step, matrix_of(60), 100, centred=False)
    write_step(tmp_path, "timestep_0020", matrix_of(60), 100, slot="out", centred=False)
    with pytest.raises(ValueError, match="to_out.0 at each of 2 steps, got none at timestep_0040"):
        load_layout(tmp_path, denoiser=pipeline.unet, show_progress=False)


def test_runs_must_be_there_and_single(tmp_path):
    with pytest.raises(ValueError, match="`directory` must be a folder"):
        load_layout(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="got neither"):
        load_layout(tmp_path)
    for name in ("run_a", "run_b"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"single run, got \['run_a', 'run_b'\]"):
        load_layout(tmp_path)
