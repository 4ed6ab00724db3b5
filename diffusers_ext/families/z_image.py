"""Z-Image: one stream of picture and text, with the text of Qwen3 through a context refiner of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from diffusers_ext.families.picture_velocity import PictureFamily
from diffusers_ext.families.published import QWEN3_4B_BODY, VAE_16, Published
from diffusers_ext.families.text_conditioning import TextConditioning

if TYPE_CHECKING:
    from diffusers import ZImagePipeline


# Numbers of the blocks that refine noise begin here; the others count from 0.
_FIRST_REFINER = 1000


class ZImage(PictureFamily):
    """Z-Image, base and Turbo; a text is as long as its prompt, and the denoiser takes lists.

    Its layers have one stream, the picture's tokens, then the text's. Erasers of GELU change the picture's alone,
    which their positions tell; the projection serves both, so that linear ones, which are LoRAs on it, change the
    text's too.
    """

    name = "z_image"
    title = "Z-Image"
    pipelines = ("ZImagePipeline",)
    modular_blocks = ("ZImageAutoBlocks",)
    denoiser_class = "ZImageTransformer2DModel"
    tools = frozenset({"nullspace", "golden_noise", "eraser"})
    golden_pipeline = "GoldenNoiseZImagePipeline"
    nullspace_pipeline = "NullSpaceDreamBoothZImagePipeline"
    flow_matching = True
    needs_diffusers = "0.39"  # before, a run had other noise levels
    own_levels = True
    negated_output = True
    latents_dtype = torch.float32
    guidance_offset = 1.0  # its call adds `scale * (v(prompt) - v(empty))` to the prompt's velocity
    text_fields = ("prompt_embeds", "attention_mask")
    text_outputs = {"prompt_embeds": 0, "attention_mask": 0}  # both of a list
    pads_text = False
    published = (
        Published(
            "Tongyi-MAI/Z-Image-Turbo",
            "Z-Image-Turbo",
            {"vae": VAE_16, "text_encoder": QWEN3_4B_BODY, "transformer": ("ZImageTransformer2DModel", {})},
            torch.bfloat16,
        ),
    )
    smallest_call = {"guidance_scale": 0.0}  # at which it is not guided
    blocks = "layers"
    text_stream = ()
    attention_linears = ("to_q", "to_k", "to_v", "to_out.0")
    joint_attention, joint_blocks = "attention", ("ZImageTransformerBlock",)

    @staticmethod
    def video_rows(arguments: Mapping[str, Any]) -> torch.Tensor:
        """Those with the first one's position along time, where the picture lies as a whole and no text."""
        turns = arguments.get("freqs_cis")  # (batch, tokens, angles) complex, time's fastest first
        if turns is None:
            raise ValueError("An attention of Z-Image with an eraser must be called with `freqs_cis`, got none.")
        return turns[..., :1] == turns[:, :1, :1]

    def is_joint_attention(self, attention: torch.nn.Module, block: torch.nn.Module) -> bool:
        """Of the layers over picture and text, not of the refiners of either."""
        found = super().is_joint_attention(attention, block)
        return found and block.modulation and block.layer_id < _FIRST_REFINER

    def check_attachment(self, config: Any) -> None:
        if config.siglip_feat_dim is not None:
            raise ValueError(
                "`model` must be of Z-Image from text alone, whose picture comes first, got one that reads pictures "
                f"besides (`siglip_feat_dim` {config.siglip_feat_dim}). Erasers do not know its order of tokens."
            )

    def attention_width(self, config: Any) -> int:
        return config["dim"]

    def encode(self, pipeline: ZImagePipeline, prompts: list[str], negatives: list[str] | None) -> TextConditioning:
        embeds, negative = pipeline.encode_prompt(
            prompt=list(prompts), negative_prompt=None if negatives is None else list(negatives)
        )
        (joined, mask), count = _joined([*embeds, *negative]), len(embeds)
        return TextConditioning(joined[:count], joined[count:], mask[:count], mask[count:])

    def network_text(
        self, encoded: tuple[Sequence[torch.Tensor], ...], arguments: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        joined, mask = _joined(encoded[0])
        return {"prompt_embeds": joined, "attention_mask": mask}

    def modular_text(self, state: Any) -> dict[str, torch.Tensor]:
        return self.network_text((state.get("prompt_embeds"),), {})

    def token_ids(self, pipeline: ZImagePipeline, prompt: str) -> list[list[int]]:
        """Of the prompt as a user's message."""
        text = pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return [pipeline.tokenizer(text, truncation=True).input_ids]

    def text_width(self, config: Any) -> int:
        return config.cap_feat_dim

    def text_arguments(self, text: TextConditioning) -> dict[str, list[torch.Tensor]]:
        """Lists of what the masks leave."""
        found = {"prompt_embeds": _texts(text.prompt_embeds, text.attention_mask)}
        if text.negative_prompt_embeds is not None:
            found["negative_prompt_embeds"] = _texts(text.negative_prompt_embeds, text.negative_attention_mask)
        return found

    def patch(self, config: Any) -> int:
        return config.all_patch_size[0]

    def sample_size(self, config: Any) -> int:
        """The config says nothing of it."""
        return 128

    def predict(
        self,
        pipeline: ZImagePipeline,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        text: TextConditioning,
        guidance_scale: float,
    ) -> torch.Tensor:
        """The model counts time from noise to picture, and its velocity points there."""
        predictions = pipeline.transformer(
            list(latents.unsqueeze(2).unbind(0)),
            (1000 - timestep.expand(len(latents))) / 1000,
            _texts(text.prompt_embeds, text.attention_mask),
            return_dict=False,
        )[0]
        return -torch.stack(list(predictions)).squeeze(2)


def _joined(texts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of different lengths as one batch, and its mask."""
    joined = pad_sequence(list(texts), batch_first=True)
    lengths = torch.tensor([len(text) for text in texts], device=joined.device)
    return joined, (torch.arange(joined.shape[1], device=joined.device) < lengths[:, None]).long()


def _texts(embeds: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    return list(embeds) if mask is None else [row[read.bool()] for row, read in zip(embeds, mask)]
