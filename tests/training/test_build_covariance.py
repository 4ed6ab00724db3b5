from __future__ import annotations

import itertools
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_ext.core.second_moment import LowRankMoment
from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.training.nullspace import statistics as build_covariance
from diffusers_ext.training.nullspace.statistics import main, parse_args
from examples.digits.check_model import load_pipeline
from tests.training.script_runs import PROMPTS, assert_same_totals, command_line, files_below

ALL = ("q", "k", "v", "out")
ARTIFACT = {"config.json", "model.safetensors", "report.json"}
PLOTS = {"plots/spectrum.png", "plots/null_dimensions.png"}


def load(folder) -> FeatureStatistics:
    return FeatureStatistics.from_pretrained(folder)


def picture(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)


def test_the_result_is_that_of_the_library(build):
    folder = build(features=ALL, negative_prompt="a red one", cross_attention_layers=[0, 2])
    pipeline = load_pipeline()
    expected = collect_statistics(
        pipeline,
        PROMPTS,
        features=ALL,
        layers=[0, 2],
        negative_prompt="a red one",
        num_inference_steps=2,
        guidance_scale=3.0,
        batch_size=2,
        show_progress=False,
    )
    found = load(folder)
    found.validate()
    found.check_pipeline(pipeline)
    expected.facts["base_model"] = found.facts["base_model"]
    assert_same_totals(found, expected)
    assert set(found.moments) == {"text"} | {
        f"{layer}.attn2.to_{slot}"
        for layer in ("down_blocks.0.attentions.0.transformer_blocks.0",
                      "mid_block.attentions.0.transformer_blocks.0")
        for slot in ("q", "out.0")
    }  # fmt: skip
    assert files_below(folder) == ARTIFACT | PLOTS


def test_report_and_plots(build, caplog):
    caplog.set_level(logging.INFO)
    folder = build(features=["q", "k"], nullspace_threshold="2e-2")
    report = json.loads((folder / "report.json").read_text())
    statistics = load(folder)
    assert (report["num_processes"], report["num_inference_steps"]) == (1, 2)
    assert report["nullspace_threshold"] == 0.02
    assert report["seconds"] > 0
    rows = {row["matrix"]: row for row in report["matrices"]}
    assert rows.keys() == statistics.moments.keys()
    for key, row in rows.items():
        values = torch.linalg.eigvalsh(statistics.moments[key].mean)
        assert row["null_dims"] == int((values < 0.02).sum())
        assert row["dim"] == len(values)
    table = next(r.message for r in caplog.records if "null_dims: eigenvalues" in r.message)
    lines = table.splitlines()[1:]
    assert lines[0].split() == list(report["matrices"][0])
    assert len(lines) == 1 + len(rows)
    assert len({len(line) for line in lines}) == 1
    for name in PLOTS:
        assert picture(folder / name).std() > 10


def test_more_forms_on_request(build):
    folder = build(
        features=["k", "out"],
        export_layout=True,
        visual_attention_map=True,
        num_attention_maps=2,
        nullspace_threshold=0.01,
    )
    statistics, layout = load(folder), FeatureStatistics.from_layout(folder / "layout")
    assert set(layout.linears) == set(statistics.linears)
    for key, moment in statistics.moments.items():
        torch.testing.assert_close(layout.moments[key].mean, moment.mean, rtol=1e-6, atol=1e-7)
    (metadata,) = set(folder.glob("layout/run_*/*/mid_block*/k_metadata.json"))
    assert metadata.parts[-3] == "timestep_0000"
    assert json.loads(metadata.read_text())["nullspace_threshold"] == 0.01
    (run,) = folder.glob("layout/run_*")
    pictures = files_below(run / "visualizations")
    assert "covariance_summaries/covariance_statistics.png" in pictures
    assert len(pictures) == 1 + 2 * 7  # every timestep and layer
    maps = [folder / f"plots/attention_{index:03d}.png" for index in range(2)]
    assert picture(maps[0]).shape != picture(maps[1]).shape  # prompts of other lengths
    assert not (folder / "plots/attention_002.png").exists()


def test_compressed_statistics(build):
    folder = build(compress=0.99)
    moment = load(folder).moments["text"]
    assert isinstance(moment, LowRankMoment)
    assert moment.vectors.shape[1] < 40
    assert load(folder).facts["compressed_energy"] == 0.99


def test_stored_spectra(build, monkeypatch):
    statistics = load(build(store_spectra=True))
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: pytest.fail("computed again"))
    assert statistics.spectrum("text").values[-1] > 0


def test_reduced_precision_with_attention_maps(build):
    folder = build(features=["q", "v"], mixed_precision="bf16", visual_attention_map=True, num_attention_maps=1)
    load(folder).check_pipeline(load_pipeline())
    assert picture(folder / "plots/attention_000.png").std() > 10


CONFIG = {
    "output_dir": "the_trained_model",
    "train_batch_size": 8,
    "seed": 5,
    "guidance_scale": 3,
    "statistics_batch_size": 2,
    "nullbooth": {
        "enable": True,
        "visual_attention_map": True,
        "num_denoising_steps": 2,
        "nullspace_threshold": "2e-2",
        "collect_features": {"q_features": True, "k_features": True, "v_features": False, "out_features": True},
        "cross_attention_layers": [1, 3],
    },
}


def write_original_yaml(path: Path, prompts_file: Path, output_dir: Path) -> Path:
    block = {
        **CONFIG["nullbooth"],
        "original_knowledge_prompts": str(prompts_file),
        "cov_matrices_output_dir": str(output_dir),
    }
    path.write_text(yaml.safe_dump({**CONFIG, "nullbooth": block}).replace("'2e-2'", "2e-2"))
    assert "nullspace_threshold: 2e-2\n" in path.read_text()
    return path


def files_without_times(folder: Path) -> set[str]:
    return {re.sub(r"run_\d{8}_\d{6}", "run", name) for name in files_below(folder)}


def read_as_documented(step: Path, layer: str, slot: str):
    """What the design documents' readers load: paths made of the layer's name and the slot."""
    place = step / layer.replace(".", "_")
    projection = place / f"{slot}_projection.npy"
    return (
        np.load(place / f"{slot}_covariance.npy"),
        np.load(projection) if projection.exists() else None,
        json.loads((place / f"{slot}_metadata.json").read_text()),
    )


def test_the_original_yaml_writes_the_tree_that_its_readers_look_for(build, tmp_path, prompts_file, caplog):
    caplog.set_level(logging.INFO)
    path = write_original_yaml(tmp_path / "nullbooth.yaml", prompts_file, tmp_path / "from_file")
    from_file = main(parse_args(command_line(config=path)))
    from_flags = build(
        "from_flags",
        seed=5,
        features=["q", "k", "out"],
        cross_attention_layers=[1, 3],
        nullspace_threshold=0.02,
        visual_attention_map=True,
        export_layout=True,
        layout_timesteps="all",
        layout_dir=".",
    )
    assert from_file == tmp_path / "from_file"
    assert_same_totals(load(from_file), load(from_flags))
    reports = [json.loads((f / "report.json").read_text()) for f in (from_file, from_flags)]
    for report in reports:
        assert report.pop("seconds") > 0
    assert reports[0] == reports[1]
    assert files_without_times(from_file) == files_without_times(from_flags)
    maps = [(f / "plots/attention_003.png").read_bytes() for f in (from_file, from_flags)]
    assert maps[0] == maps[1]

    (run,) = from_file.glob("run_*")
    statistics, timesteps = load(from_file), (501, 1)
    assert "for 2 timesteps" in caplog.text  # its size, before it is written
    layers = statistics.layers
    assert len(layers) == 2
    for index, timestep in enumerate(timesteps):
        steps = (run / f"timestep_{timestep:04d}", run / f"step_{index:03d}")
        for step, layer, slot in itertools.product(steps, layers, ("q", "k", "out")):
            covariance, projection, metadata = read_as_documented(step, layer, slot)
            expected = statistics.second_moment(layer, slot).numpy()
            np.testing.assert_allclose(covariance, expected, rtol=1e-5, atol=1e-6)
            assert covariance.dtype == np.float32
            assert metadata["actual_timestep"] == timestep
            assert metadata["pooled"] is True
            assert "each of the 2 exported timesteps" in metadata["note"]
            assert (projection is None) == (metadata["null_space_dim"] == 0)
    assert files_below(run / "visualizations") == {
        "covariance_summaries/covariance_statistics.png",
        *(f"timestep_{timestep:04d}/attention_{layer.replace('.', '_')}.png"
          for timestep in timesteps for layer in layers),
    }  # fmt: skip
    again = FeatureStatistics.from_layout(from_file)
    assert again.facts["settings"]["timesteps"] == [1, 501]
    assert again.moments["text"].count == statistics.moments["text"].count


def test_the_original_yaml_can_be_told_to_write_no_tree(tmp_path, prompts_file, fresh_accelerator):
    path = write_original_yaml(tmp_path / "nullbooth.yaml", prompts_file, tmp_path / "out")
    args = parse_args([*command_line(config=path), "--no-export_layout"])
    args.visual_attention_map = False
    assert files_below(main(args)) == ARTIFACT | PLOTS


def test_chosen_timesteps(build):
    folder = build(export_layout=True, layout_timesteps=[980, 20])
    assert {path.name for path in folder.glob("layout/run_*/*") if path.is_dir()} == {
        "timestep_0020", "timestep_0980", "visualizations",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout_timesteps": ["some"]}, "`layout_timesteps` must be 'all' or numbers, got"),
        ({"layout_timesteps": [1, 1]}, "`layout_timesteps` must be different and not negative"),
        ({"layout_dir": "../elsewhere"}, "`layout_dir` must be below the output folder"),
        (
            {"enable_xformers_memory_efficient_attention": True},
            "must have xFormers on a CUDA device, got .* Leave it out: PyTorch's scaled_dot_product",
        ),
    ],
)
def test_what_cannot_be_written_or_run_is_refused_before_the_work(build, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("diffusers.utils.is_xformers_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        build(export_layout=True, **arguments)
    assert not (tmp_path / "out").exists()


def test_a_tree_that_does_not_fit_is_refused_before_the_work(build, tmp_path, monkeypatch):
    usage = SimpleNamespace(free=1_500_000)
    monkeypatch.setattr("diffusers_ext.nullspace.npy_tree.shutil.disk_usage", lambda place: usage)
    message = r"must have [\d.]+ MB free for the npy files of 2 timesteps, got 1.5 MB in "
    with pytest.raises(ValueError, match=message):
        build(export_layout=True, layout_timesteps="all")
    assert not (tmp_path / "out").exists()


def test_without_matplotlib(build, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    for module in (build_covariance, "diffusers_ext.training.nullspace.statistics"):
        target = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{target}.is_matplotlib_available", lambda: False)
    folder = build()
    assert files_below(folder) == ARTIFACT
    assert "No plots: they need matplotlib" in caplog.text
    with pytest.raises(ValueError, match="`visual_attention_map` must have matplotlib, got none"):
        build("maps", visual_attention_map=True)
    assert not (tmp_path / "maps").exists()


def test_a_threshold_below_all_eigenvalues_is_pointed_out(build, caplog):
    build(nullspace_threshold=1e-9)
    assert "No eigenvalue is below `nullspace_threshold` 1e-09 in 1 of 1 matrices" in caplog.text


def test_upload_with_a_card(build, hub):
    folder = build(
        push_to_hub=True, hub_model_id="known", hub_token="hf_test", hub_license="mit",
        hub_base_model="somebody/base",
    )  # fmt: skip
    files = hub.files("tester/known")
    assert files.keys() - {"README.md"} == files_below(folder)
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "somebody/base"
    assert PROMPTS[0] in card.text
    assert "feature-statistics" in card.data.tags
    assert "hf_test" not in files["report.json"].decode() + card.content
    statistics = FeatureStatistics.from_pretrained("tester/known")
    assert statistics.facts["prompts"] == list(PROMPTS)


def test_an_upload_without_a_licence_is_found_before_the_collection(build, hub, tmp_path):
    with pytest.raises(ValueError, match="The flag is `--hub_license`"):
        build(push_to_hub=True)
    assert not (tmp_path / "out").exists()
    assert not hub.repos
