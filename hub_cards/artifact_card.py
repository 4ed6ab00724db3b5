"""The card of an artifact: a header that the Hub understands, and a text that people understand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import DatasetCard, ModelCard

from hub_cards.card_facts import Licence, Measured
from hub_cards.card_header import data_set_header, model_header
from hub_cards.citations import bibtex
from hub_cards.fact_checks import HUB_NAME, check_common, check_facts, check_lists
from hub_cards.kinds import KINDS
from hub_cards.render import python_literal, render


def artifact_card(
    kind: str,
    repo_id: str,
    *,
    base: str,
    licence: Licence,
    trained_on: str,
    settings: Mapping[str, object],
    results: Sequence[Measured],
    widget: Sequence[tuple[str, str]],
    version: str,
    subfolder: str | None = None,
    **facts: Any,
) -> ModelCard | DatasetCard:
    """The card of one artifact, without network. What nobody says is an error, not a gap.

    Args:
        kind: a key of `KINDS`.
        repo_id: where the artifact is going to be, `"user/name"`.
        base: Hub name of the base model, or a label for one that is not on the Hub.
        licence: of the artifact.
        trained_on: what it was made from, as Markdown.
        settings: how it was made: names and numbers or words; empty leaves the table out.
        results: what was measured; empty says that nothing was.
        widget: prompts with the picture or clip of each, a file of the repository; may be empty.
        version: of diffusers_ext.
        subfolder: of the repository, where the artifact is not in its root.
        facts: the kind's own, all of `KINDS[kind].facts`.

    Raises:
        ValueError: a fact is missing, unknown or empty.
        TypeError: an argument is missing or of a wrong type.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {list(KINDS)}, got {kind!r}.")
    found = KINDS[kind]
    check_common(repo_id, base, licence, trained_on, version)
    check_lists(settings, results, widget)
    check_facts(kind, found, facts)
    name, subfolder = repo_id.split("/")[1], (subfolder or "").strip("/")
    on_hub = bool(HUB_NAME.fullmatch(base))
    if found.repo_type == "dataset":
        data = data_set_header(
            found, licence=licence, num_rows=facts["num_pairs"], folder=subfolder
        )
    else:
        data = model_header(
            found,
            model_name=name,
            base_model=base if on_hub else None,
            licence=licence,
            results=results,
            widget=widget,
            facts=facts,
        )
    return render(
        found.template,
        data,
        subfolder=subfolder,
        name=f"{name}/{subfolder}" if subfolder else name,
        repo_id=repo_id,
        prefix=f"{subfolder}/" if subfolder else "",
        where=_arguments(repo_id, subfolder),
        snapshot=_snapshot(repo_id, subfolder),
        base=base,
        on_hub=on_hub,
        licence=licence,
        trained_on=trained_on.strip(),
        settings=settings,
        results=results,
        noted=any(result.notes for result in results),
        widget=widget,
        version=version,
        citations=bibtex(found.papers, version),
        **facts,
    )


def _arguments(repo_id: str, subfolder: str) -> str:
    """What a `from_pretrained` of one file is called with."""
    folder = f", subfolder={python_literal(subfolder)}" if subfolder else ""
    return python_literal(repo_id) + folder


def _snapshot(repo_id: str, subfolder: str) -> str:
    """A downloaded folder, for what loads from the Hub's root alone or not without this package."""
    folder = f" + {python_literal('/' + subfolder)}" if subfolder else ""
    return f"snapshot_download({python_literal(repo_id)}){folder}"
