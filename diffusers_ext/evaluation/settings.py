"""Settings of the evaluations: of LoRAs, of golden noise and of erasers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffusers_ext.core.settings import (
    COUNT,
    FINITE,
    NOT_NEGATIVE,
    WITHOUT_IT,
    ModelSettings,
    Rule,
    SamplingSettings,
    Settings,
    as_in,
    at_least,
    did_you_mean,
    required,
    setting,
)
from diffusers_ext.nullspace.settings import KnownModelSettings


@dataclass(kw_only=True)
class EvaluatedModelSettings(ModelSettings, title="model"):
    """The base model, and where it runs."""

    device: str | None = setting(None, "e.g. cuda:1; a GPU if there is one without it")


@dataclass(kw_only=True)
class PictureSettings(SamplingSettings, title="sampling"):
    """How many pictures are drawn."""

    num_images_per_prompt: int = setting(4, "seeds a prompt", rule=COUNT)
    batch_size: int = setting(8, "pictures at once", rule=COUNT)
    height: int | None = setting(None, WITHOUT_IT, rule=COUNT)
    width: int | None = setting(None, WITHOUT_IT, rule=COUNT)
    sheet_prompts: int = setting(16, "rows of the picture sheet", rule=NOT_NEGATIVE)


@dataclass(kw_only=True)
class ComparedLoraSettings(Settings, title="evaluation"):
    """Which LoRAs, on which prompts, and by what pictures are judged."""

    lora: list[str] = required("file, folder or Hub name; may be repeated", repeated=True)
    knowledge_prompts: str = required("text file, one prompt a line, # comments")
    held_out_prompts: str | None = setting(None, "text file of knowledge not in the statistics")
    subject_prompt: list[str] = setting([], "may be repeated", repeated=True)
    subject_data_dir: str | None = setting(None, "pictures of the real subject, for similarity")
    judge: str | None = setting(None, "module:attribute, imported; says whether a picture shows its prompt")
    subject_judge: str | None = setting(None, "the same for the subject prompts")
    dino: str | None = setting(None, "DINOv2 for features: folder or Hub name")
    clip: str | None = setting(None, "CLIP for scores, and features without DINOv2")
    pixel_features: bool = setting(False, "pixels as features")
    distribution: bool = setting(False, "also compare distributions")
    enable_xformers_memory_efficient_attention: bool = setting(
        False, "xFormers in place of PyTorch's own memory-efficient attention"
    )


@dataclass(kw_only=True)
class ForgettingSettings(EvaluatedModelSettings, PictureSettings, ComparedLoraSettings):
    """How a model with LoRAs is compared to itself without them."""

    guidance_scale: float | None = as_in(KnownModelSettings, "guidance_scale", default=None)

    def check(self) -> None:
        """Also whether what is asked for has features."""
        super().check()
        if self.pixel_features and self.dino:
            raise ValueError("`pixel_features` must not be given together with `dino`.")
        has_features = self.dino or self.clip or self.pixel_features
        for name in ("distribution", "subject_data_dir"):
            if getattr(self, name) and not has_features:
                raise ValueError(
                    f"`{name}` must have features to compare: pass `--dino`, `--clip` or `--pixel_features`."
                )


@dataclass(kw_only=True)
class ComparedEditSettings(Settings, title="evaluation"):
    """Which edit of knowledge, on which prompts, and by what pictures are judged."""

    edit: str = required("folder of `diffusers-ext edit`, or Hub name")
    preserve: str | None = setting(None, "prompts to keep, as a file; those that the edit kept without it")
    unseen_prompts: str | None = setting(None, "in words that the edit does not know; usual templates without it")
    max_prompts: int | None = setting(None, "of each group, evenly chosen; all without it", rule=COUNT)
    judge: str | None = setting(None, "module:attribute, imported; says whether a picture shows its prompt")
    dino: str | None = setting(None, "DINOv2 for features: folder or Hub name")
    clip: str | None = setting(None, "CLIP for scores, which judge where there is no judge, and for features")


@dataclass(kw_only=True)
class EditingSettings(EvaluatedModelSettings, PictureSettings, ComparedEditSettings):
    """How a model with an edit of its knowledge is compared to itself without it."""

    guidance_scale: float | None = as_in(KnownModelSettings, "guidance_scale", default=None)

    sheet_prompts: int = as_in(PictureSettings, "sheet_prompts", default=4, help="rows of the picture sheet a group")


@dataclass(kw_only=True)
class ComparedNoiseSettings(Settings, title="evaluation"):
    """Which networks, on which prompts and by which rewards."""

    noise_model: list[str] = setting(
        [], "folder, Hub name, or NPNet's single file; may be repeated", repeated=True, aliases=("npnet_weights_path",)
    )
    golden_noise_scale: float = setting(1.0, "how much of a network's change of the noise is taken", rule=FINITE)
    prompt_file: str = required("text file, one prompt a line, or csv; no comments")
    prompt_column: str = setting("prompt", "of a csv file")
    max_prompts: int | None = setting(None, "only the first so many", rule=COUNT)
    reward: list[str] = setting(
        [], "hpsv2, pickscore, clip_score or module:attribute; may be repeated, the first decides", repeated=True
    )
    reward_model: list[str] = setting(
        [], "REWARD=folder, file or Hub name; of a single reward without REWARD=", repeated=True
    )
    reward_version: list[str] = setting([], "the same for v2.1 etc.", repeated=True)
    save_images: bool = setting(False, "all pictures, under images/")
    best_of: int = setting(4, "random noises; 1 for no comparison", rule=COUNT)
    dino: str | None = setting(None, "DINOv2 for the diversity: folder or Hub name")
    clip: str | None = setting(None, "CLIP for the diversity; small pixels without either")


@dataclass(kw_only=True)
class NoiseTargetSettings(Settings, title="re-denoised targets"):
    """The re-denoised targets that networks learn."""

    target_steps: list[int] = setting(
        [],
        "also evaluate the noise re-denoised so often; may be repeated",
        repeated=True,
        rule=Rule("at least 1 each", lambda steps: all(step >= 1 for step in steps)),
    )
    redenoise_steps: int = setting(10, "the fewer, the stronger", rule=at_least(2))
    w1: float = setting(5.5, "guidance of the step down", rule=FINITE)
    w2: float = setting(1.0, "guidance of the step up", rule=FINITE)
    legacy_inversion: bool = setting(False, "the published form, off by one level")


@dataclass(kw_only=True)
class GoldenNoiseEvaluationSettings(
    EvaluatedModelSettings, PictureSettings, ComparedNoiseSettings, NoiseTargetSettings
):
    """How golden noise is compared to random noise."""

    pretrained_model_name_or_path: str = as_in(
        ModelSettings, "pretrained_model_name_or_path", old_names=("base_model_id",)
    )

    def check(self) -> None:
        """Also whether there is something to compare, and by what."""
        super().check()
        if not self.noise_model and not self.target_steps:
            raise ValueError("`noise_model` or `target_steps` must be given: what should be evaluated?")
        if not self.reward:
            raise ValueError("`reward` must be given at least once: what makes a picture better?")
        if self.dino and self.clip:
            raise ValueError("`dino` must not be given together with `clip`.")


@dataclass(kw_only=True)
class ComparedEraserSettings(Settings, title="evaluation"):
    """Which erasers, on which prompts."""

    eraser: list[str] = setting([], "folder or Hub name; may be repeated", repeated=True)
    scale: list[float] = setting(
        [1.0],
        "of the erasers; several are compared",
        rule=Rule("finite numbers", lambda scales: all(map(math.isfinite, scales))),
    )
    evaluation_prompts: str = required(
        "csv with the columns prompt, group (target, preserved or any other) and maybe seed"
    )
    first_frames_dir: str | None = setting(
        None, "folder of pictures that the clips of an image-to-video model begin with, by their seeds"
    )
    num_videos_per_prompt: int = setting(1, "seeds a prompt", rule=COUNT)
    kept_clips: int = setting(4, "of a group, to look at", rule=NOT_NEGATIVE)
    clip_format: str = setting("gif", "of saved clips", choices=("gif", "mp4"))
    fps: int = setting(8, "of the clips that are written", rule=Rule("in [1, 50]", lambda value: 1 <= value <= 50))


@dataclass(kw_only=True)
class VideoSettings(Settings, title="sampling"):
    """How clips are drawn."""

    negative_prompt: str = as_in(SamplingSettings, "negative_prompt", default="")
    num_inference_steps: int = setting(50, "denoising steps of a clip", rule=COUNT)
    # As in training, where `guidance_scale` once belonged to the loss.
    sampling_guidance_scale: float = setting(
        6.0,
        "of classifier-free guidance: how far past the prompt; 1 is none",
        rule=FINITE,
        aliases=("guidance_scale",),
    )
    sampling_batch_size: int = setting(1, "clips at once", rule=COUNT, aliases=("batch_size",))
    num_frames: int | None = setting(None, WITHOUT_IT, rule=COUNT)
    height: int | None = setting(None, WITHOUT_IT, rule=COUNT)
    width: int | None = setting(None, WITHOUT_IT, rule=COUNT)
    model_cpu_offload: bool = setting(False, "one model on the GPU")
    vae_tiling: bool = setting(False, "decode in tiles, for less memory")


@dataclass(kw_only=True)
class DetectorSettings(Settings, title="detector"):
    """Who says what clips show."""

    judge: str = required("clip, nudenet or module:attribute")
    concept_aspect: str | None = setting(None, "the judge's verdict about the erased concept")
    judge_frames: int | None = setting(None, "of a clip; 8 for clip, all for nudenet", rule=COUNT)
    target_concept: str | None = setting(None, "of --judge clip, one of its classes")
    classes: list[str] | None = setting(None, "of --judge clip: words")
    class_template: str = setting("a photo of {}", "of --judge clip")
    judge_model: str | None = setting(None, "CLIP: folder or Hub name; NudeNet: an ONNX file of it")
    nudenet_threshold: float = setting(0.6, "score from which a detection counts")
    nudenet_resolution: int = setting(320, "of --judge_model", rule=COUNT)
    nudenet_lenient: bool = setting(False, "bare chests, arms, bellies and feet count")


ATTACKS = ("paraphrase", "learned_embeddings", "finetune", "noise_restart", "scale")
PROMPT_FILE = "prompt_file:"
_SHARES = Rule("above 0 and below 1", lambda values: all(0 < value < 1 for value in values))


@dataclass(kw_only=True)
class AttackSettings(Settings, title="attacks"):
    """How the erased concept is to be brought back."""

    attacks: list[str] = setting(
        [], f"ways to bring the concept back: {', '.join(ATTACKS)}, or {PROMPT_FILE}PATH with prompts of a public set"
    )
    attack_steps: int = setting(300, "of learning embeddings", rule=COUNT)
    attack_restarts: int = setting(1, "of it, of which the best counts", rule=COUNT)
    num_attack_embeddings: int = setting(16, "learned behind every prompt", rule=COUNT)
    num_attack_clips: int = setting(16, "of the base, on whose states embeddings or LoRAs are learned", rule=COUNT)
    attack_batch_size: int = setting(4, "states at once", rule=COUNT)
    finetuning_steps: int = setting(100, "of a LoRA on clips of preserved prompts", rule=COUNT)
    restart_strength: list[float] = setting([0.5], "shares of the steps left to a noise restart", rule=_SHARES)
    attack_scale: list[float] = setting([0.75, 0.5], "parts of the erasers' scale", rule=_SHARES)
    paraphrases: str | None = setting(
        None, "the concept in other words: text, one a line, table, or report.json of an earlier run; usual forms "
        "around --target_concept without it",
    )  # fmt: skip
    rewriter: str | None = setting(None, "local instruct model that says the target prompts in other words")
    max_attack_prompts: int | None = setting(None, "of paraphrases and of each file, evenly chosen", rule=COUNT)

    def check(self) -> None:
        """Also whether all attacks are known and stand once."""
        super().check()
        for kind in self.attacks:
            if kind not in ATTACKS and (not kind.startswith(PROMPT_FILE) or kind == PROMPT_FILE):
                raise ValueError(
                    f"`attacks` must be of {', '.join(ATTACKS)} and {PROMPT_FILE}PATH, got {kind!r}."
                    + did_you_mean(kind, ATTACKS)
                )
        if len(set(self.attacks)) < len(self.attacks):
            raise ValueError(f"`attacks` must name each attack once, got {self.attacks}.")


@dataclass(kw_only=True)
class ErasureSettings(EvaluatedModelSettings, ComparedEraserSettings, VideoSettings, DetectorSettings, AttackSettings):
    """How a model with erasers is compared to itself without them."""

    def check(self) -> None:
        """Also whether there is an eraser, and what its detector and its attacks need."""
        super().check()
        if self.attacks and len(self.scale) > 1:
            raise ValueError(f"`scale` must be one scale where there are `--attacks`, got {self.scale}.")
        if "paraphrase" in self.attacks and not (self.paraphrases or self.rewriter or self.target_concept):
            raise ValueError(
                "One of `paraphrases`, `rewriter` and `target_concept` must be given for `--attacks paraphrase`, got "
                "none."
            )
        if not self.eraser:
            raise ValueError("`eraser` must be given at least once: what should be evaluated?")
        if self.judge == "clip" and not (self.classes and self.target_concept):
            raise ValueError(
                "`classes` and `target_concept` must be given for `--judge clip`, got "
                f"{self.classes} and {self.target_concept}."
            )
