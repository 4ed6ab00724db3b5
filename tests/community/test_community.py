from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from diffusers_ext.community import custom_pipeline_path
from examples.digits.check_model import MODEL_DIR
from tests.fresh_process import run_python
from tests.golden_noise.golden_pipelines import golden_pipeline
from tests.hub_storage import Repository
from tests.tiny_pipelines import sdxl_pipeline

NAMES = (
    "golden_noise",
    "golden_noise_flux",
    "golden_noise_hunyuan_dit",
    "golden_noise_sd3",
    "golden_noise_xl",
    "nullspace_dreambooth",
    "nullspace_dreambooth_xl",
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
    sdxl_pipeline().save_pretrained(tmp_path / "sdxl")
    bases = {"nullspace_dreambooth": MODEL_DIR, "nullspace_dreambooth_xl": tmp_path / "sdxl"}
    saved = {"golden_noise": "sd", "golden_noise_xl": "sdxl", "golden_noise_sd3": "sd3"}
    saved |= {"golden_noise_hunyuan_dit": "hunyuan_dit", "golden_noise_flux": "flux"}
    for name, family in saved.items():
        bases[name] = tmp_path / name
        golden_pipeline(family).save_pretrained(bases[name])
    assert sorted(bases) == sorted(NAMES)
    pairs = [item for name, base in bases.items() for item in (base, custom_pipeline_path(name))]
    result = run_python(LOAD, tmp_path / "home", *pairs)
    assert {name: (found, denoiser) for name, (_, _, found, denoiser) in result.items()} == {
        "NullSpaceDreamBoothPipeline": ([], "UNet2DConditionModel"),
        "NullSpaceDreamBoothXLPipeline": ([], "UNet2DConditionModel"),
        "GoldenNoisePipeline": (["GoldenNoiseModel"], "UNet2DConditionModel"),
        "GoldenNoiseXLPipeline": (["GoldenNoiseModel"], "UNet2DConditionModel"),
        "GoldenNoiseSD3Pipeline": (["GoldenNoiseModel"], "SD3Transformer2DModel"),
        "GoldenNoiseHunyuanDiTPipeline": (["GoldenNoiseModel"], "HunyuanDiT2DModel"),
        "GoldenNoiseFluxPipeline": (["GoldenNoiseModel"], "FluxTransformer2DModel"),
    }
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


@pytest.mark.parametrize("name", NAMES)
def test_every_file_offers_one_class(name):
    path = Path(custom_pipeline_path(name))
    assert path.is_file()
    (found,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign))
    (offered,) = ast.literal_eval(found.value)
    assert offered.endswith("Pipeline")


@pytest.mark.parametrize("name", ["nullspace", "__init__", "../nullspace/pipeline"])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=rf"`name` must be one of \['golden_noise', .*{name}"):
        custom_pipeline_path(name)
