"""Sets of noise pairs on the Hub: what their card tells, how they are uploaded and found."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download

from diffusers_ext.core.sources import hub_names
from diffusers_ext.golden_noise.pairs.shards import list_shards, read_table, shard_files
from diffusers_ext.hub import Measured
from diffusers_ext.hub.card import Card, make_card
from diffusers_ext.hub.kinds import public_name
from diffusers_ext.hub.push import push_folder, split_arguments

if TYPE_CHECKING:
    from diffusers_ext.golden_noise.pairs.dataset import PairDataset


# Parts of an unfinished shard, and files that a killed run left half written.
_NOT_SHARED = ("progress/*", ".*", "*/.*")
_NATIVE = ("config.json", "report.json", "deltas/*", "pairs/*", "rejected/*", "shards/*")
_SHARDS = tuple(f"{folder}/[0-9][0-9][0-9][0-9][0-9].*" for folder in ("deltas", "pairs", "rejected", "shards"))
_THIRD_PARTY = ("metadata.csv", "*.pt", "*.npz", "*.json", "*.jsonl")
_SETTINGS = (
    "redenoise_steps", "w1", "w2", "legacy_inversion", "negative_prompt", "num_inference_steps",
    "guidance_scale", "margin", "noises_per_prompt", "seed", "mixed_precision",
)  # fmt: skip


def push_pairs(pairs: PairDataset, repo_id: str, *, allow_unfinished: bool = False, **arguments: Any) -> str:
    """Upload a set as a repository of data; arguments and errors as of `PairDataset.push_to_hub`."""
    if not pairs.complete and not allow_unfinished:
        raise ValueError(
            f"{pairs.folder} must hold all of its shards to be shared, got "
            f"{len(list_shards(pairs.folder))}: its generation has not ended. Continue it by "
            "`generate_npd.py --resume_from_checkpoint latest`, or pass `allow_unfinished=True`."
        )
    hub, facts = split_arguments(arguments)
    if facts.get("results") is None:
        facts["results"] = measured(pairs.folder)
    card = pair_set_card(
        pairs.facts,
        num_pairs=len(pairs),
        num_rejected=num_rejected(pairs.folder),
        num_steps=pairs.num_steps,
        latent_shape=pairs.latent_shape,
        token=hub.get("token"),
        **facts,
    )
    return push_folder(
        pairs.folder,
        repo_id,
        card,
        repo_type="dataset",
        ignore_patterns=_NOT_SHARED,
        delete_patterns=_SHARDS,  # of a set with more of them that was there before
        **hub,
    )


def pair_set_card(
    made: Mapping[str, Any] | None,
    *,
    base_model: str | os.PathLike | None = None,
    trained_on: str | None = None,
    pipeline: str | None = None,
    reward: str | None = None,
    settings: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Callable[..., Card]:
    """The card of a set but for the name of its repository.

    Args:
        made: the facts of `generate_npd.py`, which the other arguments go before; `None` without.
        reward: name and version of what judged the pairs; the empty string for none.
        facts: further ones of every card, as of `make_card`, and the counts and shape of the set.

    Raises:
        ValueError: a fact that is neither given nor known.
    """
    made = made or {}
    base_model = base_model or made.get("pretrained_model_name_or_path")
    if base_model is None:
        raise ValueError(
            "`base_model` must be given for the card of a set that does not know how it was made, "
            "got None. Pass the Hub name of the model that its noises are for."
        )
    label = public_name(base_model)
    if reward is None and "reward" in made:
        reward = _reward(made["reward"])
    if settings is None:
        known = {name: made.get(name) for name in _SETTINGS}
        settings = {name: value for name, value in known.items() if value not in (None, "")}
    return make_card(
        "pair_data_set",
        base_model=base_model,
        trained_on=_origin(made, label, reward) if trained_on is None else trained_on,
        settings=settings,
        pipeline=pipeline or made.get("pipeline"),
        reward=reward,
        **facts,
    )


def num_rejected(folder: str | os.PathLike) -> int:
    """How many pairs the filter of a set has refused."""
    return sum(len(read_table(shard_files(folder, shard).rejected)) for shard in list_shards(folder))


def measured(folder: str | os.PathLike) -> list[Measured]:
    """Win rate and mean rewards over all pairs that were tried; nothing without a reward."""
    shards = [shard_files(folder, shard) for shard in list_shards(folder)]
    tables = [table for files in shards for table in (files.pairs, files.rejected)]
    tried = [record for table in tables for record in read_table(table)]
    judged = [record for record in tried if record.reward_golden is not None]
    if not judged:
        return []
    figures = {
        "win rate": fmean(record.reward_golden > record.reward_source for record in judged),
        "mean reward of random noise": fmean(record.reward_source for record in judged),
        "mean reward of golden noise": fmean(record.reward_golden for record in judged),
    }
    notes = f"{len(judged)} pairs, before the filter"
    return [Measured("the prompts of this set", metric, value, notes=notes) for metric, value in figures.items()]


def download_pairs(
    name: str | os.PathLike,
    *,
    argument: str = "path",
    revision: str | None = None,
    subfolder: str | None = None,
    **download_arguments: Any,
) -> Path:
    """The folder of a set from the Hub, whole.

    Raises:
        ValueError: no such repository or revision, or one that was never downloaded whole with `local_files_only`.
    """
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    offline = download_arguments.get("local_files_only", False)
    with hub_names(argument, name, "noise pairs", revision=revision, local_files_only=offline):
        snapshot = snapshot_download(
            str(name),
            repo_type="dataset",
            revision=revision,
            allow_patterns=[prefix + pattern for pattern in (*_NATIVE, *_THIRD_PARTY)],
            **download_arguments,
        )
    return Path(snapshot, prefix)


def _reward(reward: Mapping[str, Any] | None) -> str:
    if reward is None:
        return ""
    return " ".join(str(reward[key]) for key in ("name", "version") if reward.get(key))


def _origin(made: Mapping[str, Any], label: str, reward: str | None) -> str | None:
    """What a generated set was made from, in words; `None` where that is not known."""
    names = ("prompts", "noises_per_prompt", "redenoise_steps", "w1", "w2")
    if reward is None or not all(name in made for name in names):
        return None
    prompts, noises = made["prompts"]["count"], made["noises_per_prompt"]
    drawn = "one random noise" if noises == 1 else f"{noises} random noises"
    kept = "All pairs were kept."
    if reward:
        kept = (
            f"Pairs whose picture gained more than {made['margin']:g} by {reward} were kept, all "
            "others are among the rejected."
        )
    return (
        f"Re-denoised with {label} from {drawn} for each of {prompts} prompts: a step down with "
        f"guidance {made['w1']:g} and up with guidance {made['w2']:g}, of {made['redenoise_steps']} "
        f"steps. {kept}"
    )
