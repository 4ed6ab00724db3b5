"""LTX-2: clips with sound, of the text of all layers of Gemma 3 through connectors of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers_ext.families.family import Family

if TYPE_CHECKING:
    from diffusers import LTX2Pipeline


class LTX2(Family):
    """LTX-2, of which the tools know the text: it is edited, and neither trained nor drawn from by latents.

    The connectors are a component of the pipeline beside the transformer; its LoRAs are of both.
    """

    name = "ltx2"
    title = "LTX-2"
    pipelines = ("LTX2Pipeline",)
    denoiser_class = "LTX2VideoTransformer3DModel"
    vae_class = "AutoencoderKLLTX2Video"
    video_vae = True
    flow_matching = True
    text_components = ("connectors",)
    # There the connectors belong to the transformer, and the projection before them to the text encoder.
    comfyui_names = {
        r"^connectors\.text_proj_in$": "text_encoders.text_embedding_projection",
        r"^connectors\.(video|audio)_text_proj_in$": r"text_encoders.text_embedding_projection.\1_aggregate_embed",
        r"^connectors\.(video|audio)_connector\.transformer_blocks\.": (
            r"diffusion_model.\1_embeddings_connector.transformer_1d_blocks."
        ),
        r"^transformer\.": "diffusion_model.",
    }
    # One call a step, of picture and sound.
    smallest_call = {
        "num_frames": 9,
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_guidance_scale": 1.0,
        "audio_stg_scale": 0.0,
        "audio_modality_scale": 1.0,
        "spatio_temporal_guidance_blocks": None,
    }
    text_stream = ()
    joint_attention, joint_blocks, video_alone = "attn1", ("LTX2VideoTransformerBlock",), True

    def token_ids(self, pipeline: LTX2Pipeline, prompt: str) -> list[list[int]]:
        return super().token_ids(pipeline, prompt.strip())

    def text_width(self, config: Any) -> int:
        return config.caption_channels
