"""One-class files for `DiffusionPipeline.from_pretrained(base, custom_pipeline=<path>)`.

diffusers allows one pipeline class per file, so each has its own; `custom_pipeline_path` finds it.
"""

from __future__ import annotations

from pathlib import Path


def custom_pipeline_path(name: str) -> str:
    """Path of the file to pass as `custom_pipeline=`, with `trust_remote_code=True`.

    Args:
        name: `"nullspace_dreambooth"` or `"nullspace_dreambooth_xl"`; `"golden_noise"`, alone or with `"_xl"`,
            `"_hunyuan_dit"`, `"_sd3"` or `"_flux"`.
    """
    folder = Path(__file__).parent
    names = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    if name not in names:
        raise ValueError(f"`name` must be one of {names}, got {name!r}.")
    return str(folder / f"{name}.py")
