"""What all golden-noise networks have in common: one call from noise and text to golden noise, and loading by name."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffusers_ext.core.restored_state import module_eval_mode
from diffusers_ext.core.sources import CONFIG_NAME, refuse_checkpoint
from diffusers_ext.core.tensor_files import check_regular_file
from diffusers_ext.golden_noise.card import network_card
from diffusers_ext.golden_noise.networks.files import CheckedWeights, read_network_config
from diffusers_ext.golden_noise.noise_statistics import match_spectrum
from diffusers_ext.hub.card import Card
from diffusers_ext.hub.push import PushWithCard

# Only the module of the class that is asked for is imported.
NETWORK_MODULES = {
    "NPNet": "diffusers_ext.golden_noise.networks.npnet",
    "GoldenNoiseModel": "diffusers_ext.golden_noise.networks.golden_noise_model",
    "NoiseSequenceTransformer": "diffusers_ext.golden_noise.networks.sequence_transformer",
    "NoiseSequenceRNN": "diffusers_ext.golden_noise.networks.sequence_rnn",
}
# The published settings of each kind; of GoldenNoiseModel, those of the bundled example.
NETWORK_DEFAULTS: dict[str, dict[str, Any]] = {
    "npnet": {"train_batch_size": 16, "learning_rate": 1e-4, "num_epochs": 30},
    "golden_noise_model": {"train_batch_size": 32, "learning_rate": 5e-4, "num_epochs": 30},
    "transformer": {"train_batch_size": 8, "learning_rate": 5e-5, "num_epochs": 50},
    "rnn": {"train_batch_size": 16, "learning_rate": 1e-4, "num_epochs": 50},
}
# Beyond these, a new network's defaults would make it large: text of large language models, and latents that a model
# itself patches (FLUX.2), of four times the channels on half the side, as are their patches here.
_WIDE_TEXT, _MANY_CHANNELS = 4096, 64
GUARD = "guard"  # folder of a network's guard, within that of the network
_GUARD_KEY = "_noise_guard"  # of the config: diffusers passes over names that begin so
_LOADED_ALIKE = (
    "revision", "variant", "cache_dir", "token", "local_files_only", "force_download", "proxies", "use_safetensors",
)  # fmt: skip
# Of the Hub's cache: a repository's files as of one commit.
_IN_CACHE = re.compile(
    r"(?P<cache>.+)/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)/?(?P<below>.*)"
)
_SAVED_ALIKE = ("is_main_process", "safe_serialization", "variant")
_FILE_ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def fitted_structure(model: str, in_channels: int, text_embed_dim: int) -> dict[str, int]:
    """Config fields of a new network, one of `NETWORK_DEFAULTS`, that suit wide text and latents of many channels."""
    found = {}
    if model == "golden_noise_model" and text_embed_dim > _WIDE_TEXT:
        found["text_projection_dim"] = 64
    if in_channels > _MANY_CHANNELS and model in ("golden_noise_model", "transformer"):
        found["patch_size"] = 1 if model == "golden_noise_model" else 4
    return found


def load_noise_model(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> GoldenNoiseNetwork:
    """A golden-noise network from a folder or from the Hub, of the class its `config.json` names.

    Args:
        pretrained_model_name_or_path: a local folder, `"user/name"`, or a single file with the published NPNet
            weights: the official `.pth`, or safetensors with the same keys.
        kwargs: of `ModelMixin.from_pretrained`: `subfolder`, `revision`, `dtype`, ...; for a single file those of
            `NPNet.from_single_file`. Others are a `TypeError`.

    Raises:
        ValueError: nothing of that name, it holds something else, or weights that are damaged.
    """
    source = str(pretrained_model_name_or_path)
    refuse_checkpoint(Path(source, kwargs.get("subfolder") or ""))
    if not Path(source).is_dir() and (Path(source).is_file() or source.endswith(_FILE_ENDINGS)):
        return _load_single_file(Path(source), kwargs)
    name = read_network_config(source, kwargs).get("_class_name")
    if not isinstance(name, str) or name not in NETWORK_MODULES:
        raise ValueError(
            "`pretrained_model_name_or_path` must hold a golden-noise network, one of "
            f"{list(NETWORK_MODULES)}, got {name!r} in {source}. A `.pth` or safetensors file of "
            "the official code is read by `NPNet.from_single_file`."
        )
    network_class = getattr(importlib.import_module(NETWORK_MODULES[name]), name)
    return network_class.from_pretrained(source, **kwargs)


def _load_single_file(path: Path, arguments: dict[str, Any]) -> GoldenNoiseNetwork:
    # Not imported above: only the module of the class that is asked for is.
    npnet = importlib.import_module(NETWORK_MODULES["NPNet"]).NPNet
    for name in arguments:
        if name not in ("variant", "dtype"):
            raise TypeError(
                f"load_noise_model() got an unexpected keyword argument {name!r}: of a single file it "
                "takes `variant` and `dtype`."
            )
    check_regular_file(path, "Give a network's folder, its Hub name, or a file of NPNet's weights.")
    if path.name.startswith("diffusion_pytorch_model") and path.with_name("config.json").is_file():
        raise ValueError(
            f"`pretrained_model_name_or_path` must be the folder of a saved network, got its file "
            f"{path}. Give {path.parent}."
        )
    return npnet.from_single_file(path, **arguments)


def _load_guard(source: str | os.PathLike, folder: Any, arguments: dict[str, Any]) -> torch.nn.Module:
    """The guard beside a network that is loaded by these arguments."""
    if folder != GUARD:
        raise ValueError(f"`{_GUARD_KEY}` must be {GUARD!r} or null in the config of {source}, got {folder!r}.")
    where = {name: value for name, value in arguments.items() if name in _LOADED_ALIKE}
    subfolder = Path(arguments.get("subfolder") or "", GUARD).as_posix()
    guard = importlib.import_module("diffusers_ext.golden_noise.networks.guard").NoiseGuard
    cached = _IN_CACHE.fullmatch(Path(source).as_posix())
    if cached and not Path(source, subfolder, CONFIG_NAME).is_file():
        # A pipeline's download takes what lies in a component's own folder alone.
        place = {"revision": cached["revision"], "cache_dir": cached["cache"]}
        below = Path(cached["below"], subfolder).as_posix()
        return guard.from_pretrained(f"{cached['owner']}/{cached['name']}", **{**where, **place}, subfolder=below)
    if Path(source).is_dir():  # there diffusers would take the weights beside the subfolder, if any, for those in it
        return guard.from_pretrained(Path(source, subfolder), **where)
    return guard.from_pretrained(source, **where, subfolder=subfolder)


class GoldenNoiseNetwork(PushWithCard, CheckedWeights):
    """Mixin of the networks; each defines `golden_noise`, pipelines and evaluation call `refine`.

    It stands before `ModelMixin`, whose loading gets clearer errors and whose uploads get a card; the facts for it are
    the arguments of `diffusers_ext.golden_noise.card.network_card`.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> GoldenNoiseNetwork:
        """`ModelMixin.from_pretrained`, in eval mode; a pickle is read only with `use_safetensors=False`.

        Raises:
            ValueError: nothing of that name, a network of another class, or weights that are not whole, not finite, or
                not those that the config describes.
            TypeError: another keyword, also for a local folder.
        """
        if cls is GoldenNoiseNetwork:
            return load_noise_model(pretrained_model_name_or_path, **kwargs)
        cls.check_arguments(kwargs)
        # By default diffusers answers a broken download by looking for a pickle instead.
        kwargs.setdefault("use_safetensors", True)
        config = read_network_config(pretrained_model_name_or_path, kwargs)
        found = config.get("_class_name")
        if not isinstance(found, str) or found not in {parent.__name__ for parent in cls.__mro__}:
            raise ValueError(
                f"`pretrained_model_name_or_path` must hold a {cls.__name__}, got {found!r} in "
                f"{pretrained_model_name_or_path}. `load_noise_model` loads networks of any class."
            )
        cls.check_files(pretrained_model_name_or_path, config, kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if config.get(_GUARD_KEY) is not None:
            network = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
            network.set_guard(_load_guard(pretrained_model_name_or_path, config[_GUARD_KEY], kwargs))
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, **arguments: Any) -> None:
        """As in diffusers; the guard, where there is one, goes into the folder `guard`."""
        if self.guard is not None:  # first: the network's own saving may upload the folder
            passed = {name: arguments[name] for name in _SAVED_ALIKE if name in arguments}
            self.guard.save_pretrained(Path(save_directory, GUARD), **passed)
        super().save_pretrained(save_directory, **arguments)

    # A pipeline hands over, such as the `variant`, only what it finds named there.
    save_pretrained.__signature__ = inspect.signature(PushWithCard.save_pretrained)

    @property
    def guard(self) -> torch.nn.Module | None:
        """The `NoiseGuard` that decides in `refine` which noises are changed; set by `set_guard`."""
        return vars(self).get("_guard")

    def set_guard(self, guard: torch.nn.Module | None) -> None:
        """Change noise only where this `NoiseGuard` expects a gain, all noise with `None`.

        It is saved, loaded and pushed with the network, whose config names it, but is no part of its weights.
        """
        if guard is not None:
            if type(guard).__name__ != "NoiseGuard":
                raise TypeError(f"`guard` must be a NoiseGuard or None, got a {type(guard).__name__}.")
            names = ["in_channels"] if self.config.get("pooled_text") else ["in_channels", "text_embed_dim"]
            for name in names:
                if guard.config[name] != self.config.get(name, guard.config[name]):
                    raise ValueError(
                        f"`guard` must have `{name}` {self.config[name]} like its network, got {guard.config[name]}."
                    )
        vars(self)["_guard"] = guard  # not by `setattr`, which would make it a part of the weights
        if guard is not None or _GUARD_KEY in self.config:
            self.register_to_config(**{_GUARD_KEY: None if guard is None else GUARD})

    def _card(self, *, token: str | None, **facts: Any) -> Callable[..., Card]:
        return network_card(self, token=token, **facts)

    def golden_noise(
        self,
        noise: torch.Tensor,
        prompt_embeds: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The network's golden noise, before its spectrum is matched; shapes as in `refine`."""
        raise TypeError(f"{type(self).__name__} must define `golden_noise`.")

    @torch.no_grad()
    def refine(
        self,
        noise: torch.Tensor,
        prompt_embeds: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        scale: float = 1.0,
        predict: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Noise that suits the prompt, float32, with the energy of the noise that came in.

        The energy is matched ring by ring of frequency (`match_spectrum`), so it stays white. Deterministic: in eval
        mode, without sampling; the mode comes back afterwards. With a `guard`, noises of which it expects too little
        stay as they are to the bit.

        Args:
            noise: `(batch, channels, height, width)`, unit variance.
            prompt_embeds: `(batch, tokens, dim)`, the conditional text embeddings.
            attention_mask: `(batch, tokens)`, nonzero where a token is read; all when `None`.
            pooled_prompt_embeds: `(batch, pooled_dim)`, where the text encoder has them.
            scale: 0 gives `noise` to the bit, 1 the network's output.
            predict: the model's first prediction of noise, of `first_prediction`; called only where a guard reads it.
        """
        noise = noise.float()
        if scale == 0:
            return noise
        check_text(noise, prompt_embeds, attention_mask)
        dtype = next(self.parameters()).dtype
        rounded = noise.to(dtype)  # what the network changes
        with module_eval_mode(self):
            golden = self.golden_noise(
                rounded,
                prompt_embeds.to(dtype),
                attention_mask=attention_mask,
                pooled_prompt_embeds=(None if pooled_prompt_embeds is None else pooled_prompt_embeds.to(dtype)),
            ).float()
        golden = self.match_energy(noise + scale * (golden - rounded.float()), noise)
        if self.guard is None:
            return golden
        return self.guard.keep_expected_gains(golden, noise, prompt_embeds, attention_mask, predict)

    def match_energy(self, golden: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """Golden noise with the energy that its source has, ring by ring of frequency."""
        return match_spectrum(golden, source)


def check_text(noise: torch.Tensor, prompt_embeds: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    """Raise `ValueError` unless noise, text and mask are one batch of the documented shapes."""
    if noise.ndim != 4:
        raise ValueError(f"`noise` must be (batch, channels, height, width), got {tuple(noise.shape)}.")
    if prompt_embeds.ndim != 3 or len(prompt_embeds) != len(noise):
        raise ValueError(
            f"`prompt_embeds` must be ({len(noise)}, tokens, dim) for {len(noise)} noises, got "
            f"{tuple(prompt_embeds.shape)}."
        )
    if attention_mask is not None and attention_mask.shape != prompt_embeds.shape[:2]:
        raise ValueError(
            f"`attention_mask` must be {tuple(prompt_embeds.shape[:2])} like the tokens of "
            f"`prompt_embeds`, got {tuple(attention_mask.shape)}."
        )


def check_channels(noise: torch.Tensor, prompt_embeds: torch.Tensor, in_channels: int, text_embed_dim: int) -> None:
    """Raise `ValueError` unless noise and text have the widths that a network was made for."""
    if noise.shape[1] != in_channels:
        raise ValueError(
            f"`noise` must have the {in_channels} channels of this network, got {noise.shape[1]}. "
            "Load a network that was trained for this base model."
        )
    if prompt_embeds.shape[-1] != text_embed_dim:
        raise ValueError(
            f"`prompt_embeds` must be {text_embed_dim} wide for this network, got "
            f"{prompt_embeds.shape[-1]}. Load a network that was trained for this base model."
        )
