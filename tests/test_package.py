from __future__ import annotations

import configparser
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES
from setuptools import find_packages

import diffusers_ext
from diffusers_ext.nullspace.collect import collect_statistics
from tests.fresh_process import run_python
from tests.tiny_digits import random_digits_pipeline

ROOT = Path(__file__).parents[1]
FRESH = """
import os
sys.modules["diffusers_ext"] = None
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained(arguments[0])
del sys.modules["diffusers_ext"]
import diffusers_ext
home = os.environ["HF_HOME"]
print(json.dumps({
    "components": sorted(pipeline.components),
    "modules": sorted({name.split(".")[0] for name in sys.modules}),
    "files": sorted(os.listdir(home)) if os.path.isdir(home) else [],
}))
"""


def test_every_public_name_is_there():
    assert sorted(diffusers_ext.__all__) == diffusers_ext.__all__
    for name in diffusers_ext.__all__:
        assert getattr(diffusers_ext, name).__doc__ or name == "ModelMixin", name
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: diffusers_ext.__version__"
    assert diffusers_ext.__version__.count(".") == 2


def test_the_wheel_holds_one_package_with_its_data():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = find_packages(ROOT, include=setup["options.packages.find"]["include"].split())
    assert {name.split(".")[0] for name in packages} == {"diffusers_ext"}
    sources = {path.parent for path in (ROOT / "diffusers_ext").rglob("*.py")}
    assert {ROOT / name.replace(".", "/") for name in packages} == sources
    data = {
        path
        for package, pattern in setup["options.package_data"].items()
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    others = [p for p in (ROOT / "diffusers_ext").rglob("*") if p.suffix not in (".py", ".pyc")]
    assert data == {path for path in others if path.is_file()}


def test_component_classes_are_registered_with_diffusers():
    methods = ["save_pretrained", "from_pretrained"]
    assert LOADABLE_CLASSES["diffusers_ext"] == {"ModelMixin": methods, "Artifact": methods}
    for name in LOADABLE_CLASSES["diffusers_ext"]:
        assert hasattr(diffusers_ext, name)
        assert ALL_IMPORTABLE_CLASSES[name] == methods
    assert issubclass(diffusers_ext.FeatureStatistics, diffusers_ext.Artifact)


def test_saved_pipelines_load_without_the_package_and_importing_it_does_nothing_else(tmp_path):
    base = random_digits_pipeline()
    pipeline = diffusers_ext.NullSpaceDreamBoothPipeline.from_pipe(
        base, statistics=collect_statistics(base, ["a red seven"])
    )
    pipeline.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["statistics"] == ["diffusers_ext", "FeatureStatistics"]
    result = run_python(FRESH, tmp_path / "home", tmp_path / "saved")
    assert result["components"] == sorted(base.components)
    assert result["files"] == []
    assert "diffusers_ext" in result["modules"]
    assert not {"matplotlib", "training", "examples"} & set(result["modules"])


def test_loras_trained_with_the_package_are_ordinary_ones(tmp_path):
    pipeline = random_digits_pipeline()
    statistics = diffusers_ext.collect_statistics(pipeline, ["a red seven"])
    diffusers_ext.add_null_space_lora(
        pipeline.unet, statistics, instance_prompts=["a photo of sks"], pipeline=pipeline
    )
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    diffusers_ext.save_lora(type(pipeline), pipeline.unet, tmp_path)
    stock = random_digits_pipeline()
    assert type(stock) is StableDiffusionPipeline
    stock.load_lora_weights(tmp_path)
    assert diffusers_ext.check_loaded_lora(stock) == 14
