from __future__ import annotations

import ast
from pathlib import Path

import pytest

from diffusers_ext.community import custom_pipeline_path
from examples.digits.check_model import MODEL_DIR
from tests.fresh_process import run_python
from tests.tiny_pipelines import sdxl_pipeline


NAMES = ("nullspace_dreambooth", "nullspace_dreambooth_xl")
LOAD = """
from diffusers import DiffusionPipeline
result = {}
for base, path in zip(arguments[::2], arguments[1::2]):
    try:
        DiffusionPipeline.from_pretrained(base, custom_pipeline=path)
    except ValueError as error:
        refusal = str(error)
    pipeline = DiffusionPipeline.from_pretrained(base, custom_pipeline=path, trust_remote_code=True)
    import diffusers_ext
    name = type(pipeline).__name__
    same = type(pipeline) is getattr(diffusers_ext, name)
    result[name] = [refusal, same, pipeline.statistics, pipeline.unet.config.cross_attention_dim]
print(json.dumps(result))
"""


def test_custom_pipelines_are_the_installed_classes_and_need_trust(tmp_path):
    sdxl_pipeline().save_pretrained(tmp_path / "sdxl")
    paths = [custom_pipeline_path(name) for name in NAMES]
    arguments = (MODEL_DIR, paths[0], tmp_path / "sdxl", paths[1])
    result = run_python(LOAD, tmp_path / "home", *arguments)
    assert list(result) == ["NullSpaceDreamBoothPipeline", "NullSpaceDreamBoothXLPipeline"]
    for (refusal, same, statistics, width), expected in zip(result.values(), (128, 80)):
        assert "trust_remote_code=True" in refusal
        assert same
        assert statistics is None
        assert width == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_file_offers_one_class(name):
    path = Path(custom_pipeline_path(name))
    assert path.is_file()
    (found,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign))
    (offered,) = ast.literal_eval(found.value)
    assert offered.endswith("Pipeline")


@pytest.mark.parametrize("name", ["nullspace", "__init__", "../nullspace/pipeline"])
def test_unknown_names_are_refused(name):
    with pytest.raises(
        ValueError, match=rf"`name` must be one of \['nullspace_dreambooth', .*{name}"
    ):
        custom_pipeline_path(name)
