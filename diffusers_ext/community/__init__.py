"""One-class files for `DiffusionPipeline.from_pretrained(base, custom_pipeline=<path>)`, written when asked for.

diffusers takes one pipeline class a file. Which there are the families say, so that none is missing.
"""

from __future__ import annotations

from pathlib import Path

_TOOLS = {"golden_noise": "golden_pipeline", "nullspace_dreambooth": "nullspace_pipeline"}
# Of names by which the files are known, the ends that are not the family's.
_ENDS = {"sd": "", "sdxl": "_xl"}
_SOURCE = '''"""`custom_pipeline=` door to `{name}`."""

from diffusers_ext import {name}

__all__ = ["{name}"]
'''


def custom_pipeline_path(name: str) -> str:
    """Path of the file to pass as `custom_pipeline=`, with `trust_remote_code=True`.

    It lies beside the copies that diffusers makes of such files, in `HF_MODULES_CACHE`; upload it as `pipeline.py` to
    offer it on the Hub.

    Args:
        name: `"nullspace_dreambooth"`, alone or with `"_xl"`, `"_sd3"`, `"_flux"`, `"_flux2"`, `"_chroma"`,
            `"_auraflow"`, `"_qwen_image"`, `"_z_image"` or `"_wan"`; `"golden_noise"`, alone or with `"_xl"`,
            `"_hunyuan_dit"`, `"_sd3"`, `"_flux"`, `"_flux2"`, `"_flux2_dev"`, `"_qwen_image"` or `"_z_image"`.
    """
    from diffusers.utils.constants import HF_MODULES_CACHE

    from diffusers_ext.core.artifacts import write_atomically

    offered = custom_pipelines()
    if name not in offered:
        raise ValueError(f"`name` must be one of {sorted(offered)}, got {name!r}.")
    path, source = Path(HF_MODULES_CACHE, "diffusers_ext_pipelines", f"{name}.py"), _SOURCE.format(name=offered[name])
    if not path.is_file() or path.read_text() != source:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, source)
    return str(path)


def custom_pipelines() -> dict[str, str]:
    """`{name: pipeline class}` of all that `custom_pipeline_path` knows."""
    from diffusers_ext.families import FAMILIES

    return {
        f"{tool}{_ENDS.get(family.name, f'_{family.name}')}": getattr(family, pipeline)
        for family in FAMILIES
        for tool, pipeline in _TOOLS.items()
        if getattr(family, pipeline)
    }
