from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

import diffusers_ext
from diffusers_ext.community import custom_pipeline_path, custom_pipelines
from examples.digits.check_model import MODEL_DIR
from tests.fresh_process import run_python
from tests.golden_noise.golden_pipelines import golden_pipeline
from tests.hub_storage import Repository
from tests.installed_versions import lacking
from tests.tiny_current_pipelines import tiny_wan_pipeline
from tests.tiny_image_pipelines import tiny_chroma_pipeline
from tests.tiny_pipelines import sdxl_pipeline

NAMES = (
    "golden_noise",
    "golden_noise_flux",
    "golden_noise_flux2",
    "golden_noise_flux2_dev",
    "golden_noise_hunyuan_dit",
    "golden_noise_qwen_image",
    "golden_noise_sd3",
    "golden_noise_xl",
    "golden_noise_z_image",
    "nullspace_dreambooth",
    "nullspace_dreambooth_auraflow",
    "nullspace_dreambooth_chroma",
    "nullspace_dreambooth_flux",
    "nullspace_dreambooth_flux2",
    "nullspace_dreambooth_qwen_image",
    "nullspace_dreambooth_sd3",
    "nullspace_dreambooth_wan",
    "nullspace_dreambooth_xl",
    "nullspace_dreambooth_z_image",
)
LOAD = """
from diffusers import DiffusionPipeline
result = {}
for base, path in zip(arguments[::2], arguments[1::2]):
    refusal = "none"
    try:
        DiffusionPipeline.from_pretrained(base, custom_pipeline=path)
    except ValueError as error:
        refusal = str(error)
    pipeline = DiffusionPipeline.from_pretrained(base, custom_pipeline=path, trust_remote_code=True)
    import diffusers_ext
    name = type(pipeline).__name__
    same = type(pipeline) is getattr(diffusers_ext, name)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    networks = [getattr(pipeline, name, None) for name in ("statistics", "noise_model")]
    found = [type(network).__name__ for network in networks if network is not None]
    result[name] = [refusal, same, found, type(denoiser).__name__]
print(json.dumps(result))
"""


def test_custom_pipelines_are_the_installed_classes_and_need_trust(tmp_path):
    bases = {"nullspace_dreambooth": MODEL_DIR}
    for name, build in {"xl": sdxl_pipeline, "chroma": tiny_chroma_pipeline, "wan": tiny_wan_pipeline}.items():
        bases[f"nullspace_dreambooth_{name}"] = tmp_path / name
        build().save_pretrained(tmp_path / name)
    saved = {"golden_noise": "sd", "golden_noise_xl": "sdxl", "golden_noise_sd3": "sd3"}
    saved |= {
        f"golden_noise_{name}": name for name in ("hunyuan_dit", "flux", "flux2", "flux2_dev", "qwen_image", "z_image")
    }
    saved = {name: family for name, family in saved.items() if not lacking(family)}
    for name, family in saved.items():
        bases[name] = tmp_path / name
        golden_pipeline(family).save_pretrained(bases[name])
    pairs = [item for name, base in bases.items() for item in (base, custom_pipeline_path(name))]
    result = run_python(LOAD, tmp_path / "home", *pairs)
    expected = {
        "NullSpaceDreamBoothPipeline": ([], "UNet2DConditionModel"),
        "NullSpaceDreamBoothXLPipeline": ([], "UNet2DConditionModel"),
        "NullSpaceDreamBoothChromaPipeline": ([], "ChromaTransformer2DModel"),
        "NullSpaceDreamBoothWanPipeline": ([], "WanTransformer3DModel"),
        "GoldenNoisePipeline": (["GoldenNoiseModel"], "UNet2DConditionModel"),
        "GoldenNoiseXLPipeline": (["GoldenNoiseModel"], "UNet2DConditionModel"),
        "GoldenNoiseSD3Pipeline": (["GoldenNoiseModel"], "SD3Transformer2DModel"),
        "GoldenNoiseHunyuanDiTPipeline": (["GoldenNoiseModel"], "HunyuanDiT2DModel"),
        "GoldenNoiseFluxPipeline": (["GoldenNoiseModel"], "FluxTransformer2DModel"),
        "GoldenNoiseFlux2KleinPipeline": (["GoldenNoiseModel"], "Flux2Transformer2DModel"),
        "GoldenNoiseFlux2Pipeline": (["GoldenNoiseModel"], "Flux2Transformer2DModel"),
        "GoldenNoiseQwenImagePipeline": (["GoldenNoiseModel"], "QwenImageTransformer2DModel"),
        "GoldenNoiseZImagePipeline": (["GoldenNoiseModel"], "ZImageTransformer2DModel"),
    }
    if lacking("z_image"):
        del expected["GoldenNoiseZImagePipeline"]
    assert {name: (found, denoiser) for name, (_, _, found, denoiser) in result.items()} == expected
    for refusal, same, _, _ in result.values():
        assert "trust_remote_code=True" in refusal
        assert same


FROM_THE_HUB = """
from diffusers import DiffusionPipeline
import diffusers_ext
result = {}
for custom in arguments:
    refusal = "none"
    try:
        DiffusionPipeline.from_pretrained("tester/base", custom_pipeline=custom)
    except ValueError as error:
        refusal = str(error)
    for trip in ("first", "from the cache"):
        pipeline = DiffusionPipeline.from_pretrained(
            "tester/base", custom_pipeline=custom, trust_remote_code=True
        )
    name = type(pipeline).__name__
    own = sorted({"noise_model", "statistics"} & set(pipeline.components))
    result[name] = [refusal, type(pipeline) is getattr(diffusers_ext, name), own]
print(json.dumps(result))
"""


def test_custom_pipelines_from_a_file_and_from_the_hub(hub, hub_process, tmp_path):
    """The base and one pipeline are on the Hub, the other is a file of the user's own name."""
    for repo_id, folder in {"tester/base": MODEL_DIR, "tester/custom": tmp_path / "custom"}.items():
        hub.repos[repo_id] = Repository(repo_id, "models", private=False)
        if not Path(folder).exists():
            folder.mkdir()
            shutil.copy(custom_pipeline_path("golden_noise"), folder / "pipeline.py")
        hub.repos[repo_id].put(Path(folder))
    file = shutil.copy(custom_pipeline_path("nullspace_dreambooth"), tmp_path / "my_own.py")
    result = hub_process(FROM_THE_HUB, "tester/custom", file)
    assert {name: own for name, (_, _, own) in result.items()} == {
        "GoldenNoisePipeline": ["noise_model"],
        "NullSpaceDreamBoothPipeline": ["statistics"],
    }
    for refusal, same, _ in result.values():
        assert "trust_remote_code=True" in refusal
        assert same


def test_every_pipeline_of_the_package_has_a_file_that_offers_it_alone():
    assert sorted(custom_pipelines()) == list(NAMES)
    assert set(custom_pipelines().values()) == {name for name in diffusers_ext.__all__ if name.endswith("Pipeline")}
    for name, offered in custom_pipelines().items():
        path = Path(custom_pipeline_path(name))
        found = runpy.run_path(str(path))
        assert [part for part in found if not part.startswith("__")] == [offered] == found["__all__"]
        assert found[offered] is getattr(diffusers_ext, offered)


def test_a_file_that_was_changed_is_written_anew():
    path = Path(custom_pipeline_path("golden_noise"))
    source, written = path.read_text(), path.stat().st_mtime_ns
    assert Path(custom_pipeline_path("golden_noise")).stat().st_mtime_ns == written
    path.write_text("broken")
    assert Path(custom_pipeline_path("golden_noise")).read_text() == source


@pytest.mark.parametrize("name", ["nullspace", "__init__", "../nullspace/pipeline"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=rf"`name` must be one of \['golden_noise', .*{name}"):
        custom_pipeline_path(name)
