"""The upload of generated noise pairs as a repository of data, and its check before the generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.logging import get_logger

from diffusers_ext.golden_noise.pair_set_hub import pair_set_card
from diffusers_ext.golden_noise.pairs import PairDataset
from diffusers_ext.golden_noise.settings import PairSettings
from diffusers_ext.hub.push import check_card, make_repository
from training.upload import card_arguments, repository_name, upload_arguments


logger = get_logger(__name__)


def prepare_pair_upload(
    args: PairSettings, facts: Mapping[str, Any], latent_shape: Sequence[int]
) -> None:
    """Make the repository and let the Hub read a card before the set is made, not after it.

    Args:
        args: of the script.
        facts: how the set is going to be made.
        latent_shape: `(channels, height, width)`.

    Raises:
        ValueError: a fact is not known, such as the licence, or the Hub refuses the card.
    """
    counts = {"num_pairs": 0, "num_rejected": 0, "num_steps": args.num_steps}
    card = pair_set_card(facts, latent_shape=latent_shape, **counts, **card_arguments(args))
    check_card(card("user/name"))
    make_repository(repository_name(args), repo_type="dataset", **upload_arguments(args))


def publish_pairs(args: PairSettings) -> str:
    """Upload the finished set of the output folder; returns the address of the commit."""
    pairs = PairDataset(args.output_dir, verify=False)  # written by this run
    facts = {**card_arguments(args), **upload_arguments(args)}
    commit = pairs.push_to_hub(repository_name(args), **facts)
    logger.info(f"Uploaded to {commit}")
    return commit
