from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_ext.nullspace.npy_tree import MatrixFile, find_files, find_linear, read_matrix, read_metadata, safe_name
from tests.tiny_models import sd_unet

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"


def asymmetric() -> np.ndarray:
    matrix = np.eye(4)
    matrix[0, 1] = 0.5
    return matrix


def test_matrices_are_found_in_both_forms_and_nothing_else_is(tmp_path):
    names = [
        f"step_003/{safe_name(LAYER)}/q_covariance.npy",
        f"timestep_0980/{safe_name(LAYER)}/out_covariance.npy",
        f"covariance_matrices/module_{safe_name(LAYER)}/alpha_07_0812_v_cov.npy",
        f"covariance_matrices/{safe_name(LAYER)}/timestep_0020_k_cov.npy",
    ]
    others = [
        f"visualizations/{safe_name(LAYER)}/q_covariance.npy",
        f"timestep_0980/{safe_name(LAYER)}/out_projection.npy",
        f"timestep_0980/{safe_name(LAYER)}/out_covariance.npy.tmp",
    ]
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = find_files(tmp_path)
    assert [file.path for file in files] == sorted(tmp_path / name for name in names)
    found = {(file.step, file.timestep, file.slot, file.metadata_path.name) for file in files}
    assert found == {
        ("step_003", 3, "q", "q_metadata.json"),
        ("timestep_0980", 980, "out", "out_metadata.json"),
        ("alpha_07_0812", 812, "v", "alpha_07_0812_v_metadata.json"),
        ("timestep_0020", 20, "k", "timestep_0020_k_metadata.json"),
    }


def test_a_matrix_is_read_in_float64_and_symmetric(tmp_path):
    matrix = np.eye(4, dtype=">f4")
    matrix[0, 1], matrix[1, 0] = 1e-5, 2e-5
    np.save(tmp_path / "q.npy", matrix)
    read = read_matrix(tmp_path / "q.npy", 4)
    assert read.dtype == torch.float64
    assert torch.equal(read, read.T)
    assert read[0, 1].item() == pytest.approx(1.5e-5)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.full((4, 4), np.nan), "q.npy must be finite"),
        (np.full((4, 4), np.inf), "q.npy must be finite"),
        (asymmetric(), "q.npy must be a symmetric matrix"),
        (np.eye(3), r"q.npy must hold 4 x 4 floats, .* of shape \(3, 3\)"),
        (np.ones(4), r"q.npy must hold 4 x 4 floats, .* of shape \(4,\)"),
        (np.eye(4, dtype=np.int64), "q.npy must hold 4 x 4 floats, .* got int64"),
        (np.array([[{}] * 4] * 4), "q.npy must be a whole npy file of floats, got: Object arrays"),
    ],
)
def test_unfit_matrices_are_refused_by_name(tmp_path, matrix, message):
    np.save(tmp_path / "q.npy", matrix, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_matrix(tmp_path / "q.npy", 4)


@pytest.mark.parametrize("size", [0, 40, 200])
def test_cut_off_files_are_refused_by_name(tmp_path, size):
    np.save(tmp_path / "q.npy", np.eye(4))
    whole = (tmp_path / "q.npy").read_bytes()
    (tmp_path / "q.npy").write_bytes(whole[:size])
    with pytest.raises(ValueError, match="q.npy must be a whole npy file of floats"):
        read_matrix(tmp_path / "q.npy", 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "q_metadata.json must hold JSON"),
        ("[]", "q_metadata.json must hold a JSON object, got a list"),
        ("{}", "`n_samples` must be a positive integer in .*q_metadata.json, got None"),
        ('{"n_samples": 0, "feature_dim": 4}', "`n_samples` must be a positive integer .* got 0"),
        ('{"n_samples": 3, "feature_dim": "4"}', "`feature_dim` must be .* got '4'"),
    ],
)
def test_unfit_metadata_are_refused_by_name(tmp_path, text, message):
    (tmp_path / "q_metadata.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_metadata(tmp_path / "q_metadata.json")


def test_missing_metadata_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="q_metadata.json must stand beside its matrix"):
        read_metadata(tmp_path / "q_metadata.json")


@pytest.fixture
def keys_file(tmp_path) -> MatrixFile:
    folder = tmp_path / "step_000" / f"module_{safe_name(LAYER)}"
    folder.mkdir(parents=True)
    (folder / "k_covariance.npy").touch()
    return find_files(tmp_path)[0]


@pytest.fixture(scope="module")
def modules() -> dict[str, torch.nn.Module]:
    return dict(sd_unet().model.named_modules())


def test_the_linear_is_named_by_metadata_or_found_by_folder(keys_file, modules):
    named = {"layer": "elsewhere.attn2", "feature_dim": 32}
    assert find_linear(keys_file, named, None) == "elsewhere.attn2.to_k"
    assert find_linear(keys_file, {"feature_dim": 32}, modules) == f"{LAYER}.to_k"
    unnamed = {"layer": None, "feature_dim": 32}
    assert find_linear(keys_file, unnamed, modules) == f"{LAYER}.to_k"


def test_a_folder_name_alone_does_not_name_a_layer(keys_file):
    with pytest.raises(ValueError, match="must name its `layer`, got a folder name only"):
        find_linear(keys_file, {"feature_dim": 32}, None)


def test_unknown_layers_are_refused(keys_file, modules):
    elsewhere = keys_file._replace(layer_folder="down_blocks_7_attn2")
    with pytest.raises(ValueError, match="after one cross-attention layer of `denoiser`, got 0"):
        find_linear(elsewhere, {"feature_dim": 32}, modules)
    with pytest.raises(ValueError, match="must belong to a Linear of `denoiser`, got 'elsewhere"):
        find_linear(keys_file, {"layer": "elsewhere.attn2", "feature_dim": 32}, modules)


def test_unknown_slots_are_refused(keys_file):
    with pytest.raises(ValueError, match="`slot` must be one of .*, got 'keys'"):
        find_linear(keys_file._replace(slot="keys"), {"layer": LAYER}, None)


def test_other_widths_are_refused(keys_file, modules):
    with pytest.raises(ValueError, match=r"inputs of .*to_k \(width 32\), got width 8"):
        find_linear(keys_file, {"feature_dim": 8}, modules)
