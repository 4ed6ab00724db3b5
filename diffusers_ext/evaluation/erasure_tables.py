"""The tables of an evaluation of erasers, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusers_ext.evaluation.erasure_summary import BASE
from diffusers_ext.evaluation.report_files import markdown_table, number_cell, spoken


_MOST_READINGS = 4


def erasure_tables(
    groups: Mapping[str, Mapping[str, Any]], sides: Sequence[str], concept_aspect: str
) -> str:
    """Rates, figures, readings and degenerate clips of all groups, with 95 % intervals in brackets.

    `groups` are as of `summarize_group`; the verdict `concept_aspect` is marked.
    """
    tables = [_rates(groups, sides, concept_aspect), _figures(groups, sides)]
    tables += _readings(groups, sides)
    tables += [table for table in [_degenerate(groups)] if len(table) > 1]
    return "\n\n".join(markdown_table(table, 2) for table in tables) + "\n"


def _rates(
    groups: Mapping[str, Mapping[str, Any]], sides: Sequence[str], concept_aspect: str
) -> list[list[str]]:
    ends = [end for side in sides for end in (side, _difference(side, sides))]
    table = [["group", "seen", "clips", BASE, *ends]]
    for group, found in groups.items():
        for aspect, first in found["rates"][sides[0]].items():
            if not first["pairs"]:
                continue
            name = f"{aspect} (the concept)" if aspect == concept_aspect else aspect
            row = [spoken(group), name, str(first["pairs"])]
            row.append(_number(first["base"], first["base_interval"]))
            for side in sides:
                rate = found["rates"][side][aspect]
                row.append(_number(rate["other"], rate["other_interval"]))
                row.append(_number(rate["difference"], rate["difference_interval"]))
            table.append(row)
    return table


def _figures(groups: Mapping[str, Mapping[str, Any]], sides: Sequence[str]) -> list[list[str]]:
    ends = [
        end for side in sides for end in (side, "ratio" if len(sides) < 2 else f"{side}: ratio")
    ]
    table = [["group", "figure", "clips", BASE, *ends]]
    for group, found in groups.items():
        for name, first in found["figures"][sides[0]].items():
            if not first["pairs"]:
                continue
            row = [spoken(group), spoken(name), str(first["pairs"]), _number(first.get("base"))]
            for side in sides:
                figure = found["figures"][side][name]
                row.append(_number(figure["other"], figure.get("other_interval")))
                row.append(_number(figure.get("ratio"), figure.get("ratio_interval")))
            table.append(row)
    return table


def _readings(
    groups: Mapping[str, Mapping[str, Any]], sides: Sequence[str]
) -> Iterator[list[list[str]]]:
    names = dict.fromkeys(name for found in groups.values() for name in found["readings"])
    for name in names:
        table = [[f"{spoken(name)}, by group", *(f"on {side}" for side in (BASE, *sides))]]
        for group, found in groups.items():
            if name in found["readings"]:
                shares = found["readings"][name]
                table.append([spoken(group), *(_shares(shares[side]) for side in (BASE, *sides))])
        yield table


def _degenerate(groups: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Only where there is any."""
    table: list[list[str]] = []
    for group, found in groups.items():
        for side, counts in found["degenerate"].items():
            table = table or [["degenerate clips", "side", *counts, "pairs left out"]]
            if any(counts.values()):
                left_out = str(found["left_out"]) if side == BASE else "-"
                table.append([spoken(group), side, *map(str, counts.values()), left_out])
    return table


def _difference(side: str, sides: Sequence[str]) -> str:
    return "difference" if len(sides) < 2 else f"{side}: difference"


def _shares(shares: Mapping[str, float]) -> str:
    shown = [f"{word} {share:.1%}" for word, share in list(shares.items())[:_MOST_READINGS]]
    rest = sum(list(shares.values())[_MOST_READINGS:])
    return ", ".join([*shown, f"others {rest:.1%}"] if rest else shown) or "-"


def _number(value: float | None, interval: Sequence[float] | None = None) -> str:
    return number_cell(value, interval, ".3f")
