"""The YAML at the top of a README, and what the Hub refuses in it."""

from __future__ import annotations

import re
from typing import Any

import yaml

_HEADER = re.compile(r"\A---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
_LICENCES = frozenset(
    "afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigscience-bloom-rail-1.0 bigscience-openrail-m bsd "
    "bsd-2-clause bsd-3-clause bsl-1.0 c-uda cc cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 "
    "cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 "
    "cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 creativeml-openrail-m deepfloyd-if-license "
    "ecl-2.0 epl-2.0 etalab-2.0 eupl-1.1 gemma gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 "
    "llama2 llama3 mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl "
    "postgresql unknown unlicense wtfpl zlib".split()
)


def card_header(text: str) -> dict[str, Any]:
    """The YAML at the top; empty without one."""
    found = _HEADER.match(text)
    header = yaml.safe_load(found[1]) if found else {}
    return header if isinstance(header, dict) else {}


def metadata_errors(text: str, kind: str) -> list[str]:
    """What keeps the Hub from taking a README; `kind` is "models" or "datasets"."""
    found = _HEADER.match(text)
    if not found:
        return []
    try:
        header = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    if not isinstance(header, dict):
        return ["The metadata must be a mapping."]
    errors = [
        f'"{key}" with value "{value}" is not valid'
        for key, allowed in (("license", _LICENCES.__contains__), *_NAMES.items())
        for value in _listed(header.get(key))
        if not (isinstance(value, str) and allowed(value))
    ]
    if not all(isinstance(tag, str) for tag in _listed(header.get("tags"))):
        errors.append('"tags" must be strings')
    if kind == "models":
        errors += _result_errors(header.get("model-index"))
    for config in header.get("configs", []):
        if not (isinstance(config, dict) and {"config_name", "data_files"} <= set(config)):
            errors.append('"configs" must name "config_name" and "data_files"')
    return errors


_NAMES = dict.fromkeys(("base_model", "datasets"), _REPOSITORY.fullmatch)
_NAMES["base_model_relation"] = {"adapter", "finetune", "merge", "quantized"}.__contains__
_NAMES["license_link"] = re.compile(r"https?://\S+|LICENSE(\.md)?").fullmatch


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _result_errors(index: Any) -> list[str]:
    errors = []
    for model in index or []:
        if not isinstance(model.get("name"), str):
            errors.append('"model-index" needs "name"')
        for number, result in enumerate(model.get("results") or []):
            at = f'"model-index[0].results[{number}]'
            if not isinstance(result.get("task", {}).get("type"), str):
                errors.append(f'{at}.task.type" is required')
            for key in ("type", "name"):
                if not isinstance(result.get("dataset", {}).get(key), str):
                    errors.append(f'{at}.dataset.{key}" is required')
            for metric in result.get("metrics") or [{}]:
                if not isinstance(metric.get("type"), str) or "value" not in metric:
                    errors.append(f'{at}.metrics" need "type" and "value"')
    return errors
