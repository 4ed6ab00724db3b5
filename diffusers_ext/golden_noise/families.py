"""The model families that golden noise knows, told by their pipelines."""

from __future__ import annotations

from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    HunyuanDiTPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)


FAMILIES: dict[type[DiffusionPipeline], str] = {
    StableDiffusionPipeline: "sd",
    StableDiffusionXLPipeline: "sdxl",
    HunyuanDiTPipeline: "hunyuan_dit",
    StableDiffusion3Pipeline: "sd3",
    FluxPipeline: "flux",
}


def pipeline_family(pipeline: DiffusionPipeline) -> str:
    """`"sd"`, `"sdxl"`, `"hunyuan_dit"`, `"sd3"` or `"flux"`.

    Raises:
        ValueError: a pipeline of another family.
    """
    for pipeline_class, family in FAMILIES.items():
        if isinstance(pipeline, pipeline_class):
            return family
    supported = ", ".join(pipeline_class.__name__ for pipeline_class in FAMILIES)
    raise ValueError(
        f"`pipeline` must be one of {supported} or derived from one, got a "
        f"{type(pipeline).__name__}."
    )


def has_embedded_guidance(pipeline: DiffusionPipeline) -> bool:
    """Whether the denoiser takes the guidance scale as an input (Flux.1-dev, LCM)."""
    family = pipeline_family(pipeline)
    if family in ("sd", "sdxl"):
        return pipeline.unet.config.time_cond_proj_dim is not None
    return family == "flux" and bool(pipeline.transformer.config.guidance_embeds)
