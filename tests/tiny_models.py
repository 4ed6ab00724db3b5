"""Tiny random denoisers of real diffusers classes, each with the arguments of one forward call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)


class TinyModel(NamedTuple):
    """A denoiser in evaluation mode and keyword arguments that its `forward` takes."""

    model: torch.nn.Module
    inputs: dict[str, Any]

    def run(self) -> torch.Tensor:
        """The model's prediction for `inputs`."""
        found = self.model(**self.inputs, return_dict=False)[0]
        return torch.stack(found) if isinstance(found, list) else found


def sd_unet() -> TinyModel:
    """Stable Diffusion: 32-wide text, 4 cross-attention layers."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": torch.randn(2, 7, 32),
    }
    return TinyModel(unet.eval(), inputs)


def sdxl_unet() -> TinyModel:
    """Stable Diffusion XL: two transformer blocks a layer, linear projections, added conditions."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        norm_num_groups=8,
    )
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": torch.randn(2, 7, 24),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 16), "time_ids": torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2)},
    }
    return TinyModel(unet.eval(), inputs)


def pixart() -> TinyModel:
    """PixArt-alpha: self-attention and cross-attention with a text mask."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=12,
        norm_num_groups=8,
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([10, 10]),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return TinyModel(transformer.eval(), inputs)


def hunyuan_dit() -> TinyModel:
    """HunyuanDiT: rotary embeddings reach the attention layers as a keyword argument."""
    torch.manual_seed(0)
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        hidden_size=16,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        num_layers=4,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
        text_len=5,
        text_len_t5=6,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([10.0, 10.0]),
        "encoder_hidden_states": torch.randn(2, 5, 8),
        "encoder_hidden_states_t5": torch.randn(2, 6, 8),
        "text_embedding_mask": torch.ones(2, 5, dtype=torch.long),
        "text_embedding_mask_t5": torch.ones(2, 6, dtype=torch.long),
        "image_meta_size": torch.tensor([[8.0, 8, 8, 8, 0, 0]] * 2),
        "style": torch.zeros(2, dtype=torch.long),
        "image_rotary_emb": rotary_embedding(tokens=16, width=8),
    }
    return TinyModel(transformer.eval(), inputs)


def sd3() -> TinyModel:
    """Stable Diffusion 3: joint attention; the last block drops the text."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([10, 10]),
    }
    return TinyModel(transformer.eval(), inputs)


def cogvideox() -> TinyModel:
    """CogVideoX: joint attention over text and video with rotary embeddings."""
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=True,
    )
    inputs = {
        "hidden_states": torch.randn(2, 3, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 6, 8),
        "timestep": torch.tensor([10, 10]),
        "image_rotary_emb": rotary_embedding(tokens=48, width=8),
    }
    return TinyModel(transformer.eval(), inputs)


def flux() -> TinyModel:
    """Flux: a joint and a single-stream block, whose processors are called positionally."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 7, 12),
        "pooled_projections": torch.randn(2, 10),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(7, 3),
    }
    return TinyModel(transformer.eval(), inputs)


def wan() -> TinyModel:
    """Wan: self-attention and cross-attention over video, called positionally."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=24,
        num_layers=2,
        rope_max_seq_len=16,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([10]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
    }
    return TinyModel(transformer.eval(), inputs)


def z_image() -> TinyModel:
    """Z-Image: one stream of picture and text, of lists; refiners before it have attentions of the same name."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[8, 4, 4],
        axes_lens=[128, 16, 16],
    )
    # Their values are whatever is in memory until weights are loaded.
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    inputs = {
        "x": list(torch.randn(2, 4, 1, 8, 8)),
        "t": torch.tensor([0.3, 0.3]),
        "cap_feats": [torch.randn(7, 12), torch.randn(40, 12)],
    }
    return TinyModel(transformer.eval(), inputs)


def rotary_embedding(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `(tokens, width)` of a one-dimensional rotary embedding."""
    angles = torch.outer(torch.arange(tokens), 10.0 ** -torch.arange(0, width, 2).div(width))
    angles = angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


DENOISERS: dict[str, Callable[[], TinyModel]] = {
    builder.__name__: builder for builder in (sd_unet, sdxl_unet, pixart, hunyuan_dit, sd3, cogvideox, flux, wan)
}
