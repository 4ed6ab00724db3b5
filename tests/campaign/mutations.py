"""Ways in which a file can be damaged, or altered by one who means harm."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

Mutation = Callable[[Path], None]
MARKER = "code_ran"  # written beside the artifact by whatever runs
_BOMB = "(([a-z_0-9.]+)+)+!"


class Runs:
    """A pickle that runs code when it is read carelessly."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def mutations(path: Path, rng: random.Random) -> Iterator[tuple[str, Mutation]]:
    """All mutations of one file, by what they are called."""
    yield from _of_any_file(path, rng)
    if path.suffix == ".safetensors":
        yield from _of_tensors(path, rng)
    elif path.suffix == ".json":
        yield from _of_json(path, rng)
    elif path.suffix in (".pt", ".pth"):
        yield from _of_pickles(path)
    elif path.suffix in (".txt", ".csv", ".tsv", ".jsonl", ".yaml"):
        yield from _of_text(path)


def _write(content: bytes) -> Mutation:
    return lambda path: path.write_bytes(content)


def _of_any_file(path: Path, rng: random.Random) -> Iterator[tuple[str, Mutation]]:
    content = path.read_bytes()
    for share in (0.0, 0.3, 0.9):
        yield f"truncated to {share:.0%}", _write(content[: int(len(content) * share)])
    yield "one byte short", _write(content[:-1])
    yield "longer by other bytes", _write(content + bytes(rng.randrange(256) for _ in range(9)))
    for place in ("start", "any", "any", "any", "end"):
        position = {"start": 0, "end": len(content) - 1}.get(place, rng.randrange(len(content)))
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        yield f"bit flipped at byte {position}", _write(bytes(flipped))
    yield "other bytes", _write(bytes(rng.randrange(256) for _ in range(200)))
    yield "a pickle that runs code", lambda p: p.write_bytes(pickle.dumps(Runs(_marker(p))))
    yield "a pipe", lambda p: (p.unlink(), os.mkfifo(p))
    yield "a folder", lambda p: (p.unlink(), p.mkdir())
    yield "a link to itself", lambda p: (p.unlink(), p.symlink_to(p.name))
    yield "a device without end", lambda p: (p.unlink(), p.symlink_to("/dev/zero"))
    yield "missing", lambda p: p.unlink()


def _marker(path: Path) -> Path:
    """In the folder that holds the altered artifact, whatever is below it."""
    return next(parent for parent in path.parents if parent.name == "altered").parent / MARKER


def _of_tensors(path: Path, rng: random.Random) -> Iterator[tuple[str, Mutation]]:
    """With the metadata as it was; then for those that checks must find without a digest, bare."""
    with safe_open(path, "pt") as handle:
        tensors = {key: handle.get_tensor(key).clone() for key in handle.keys()}
        metadata = handle.metadata() or {}
    floating = [key for key, value in tensors.items() if value.is_floating_point()]
    first = rng.choice(floating or list(tensors))
    bare = {key: value for key, value in metadata.items() if not key.startswith("diffusers_ext.")}
    changes = {
        "NaN": _filled(tensors, first, float("nan")),
        "infinity": _filled(tensors, first, float("inf")),
        "a missing key": {k: v for k, v in tensors.items() if k != first},
        "a further key": {**tensors, "further.weight": torch.ones(2)},
        "a renamed key": {k + "x" if k == first else k: v for k, v in tensors.items()},
        "another shape": {**tensors, first: tensors[first].reshape(-1)[:-1].clone()},
        "a further axis": {**tensors, first: tensors[first][None].clone()},
        "no rows": {**tensors, first: tensors[first].new_zeros(0)},
        "integers": {**tensors, first: tensors[first].to(torch.int32)},
        "truth values": {**tensors, first: tensors[first] != 0},
        "complex numbers": {**tensors, first: tensors[first].to(torch.complex64)},
        "no tensors": {},
    }  # fmt: skip
    for name, changed in changes.items():
        yield name, _write(save(changed, metadata))
        if metadata != bare:
            yield f"{name}, without a digest", _write(save(changed, bare))
    same = [k for k in tensors if k != first and tensors[k].shape == tensors[first].shape]
    if same:
        swapped = {**tensors, first: tensors[same[0]], same[0]: tensors[first]}
        yield "two keys swapped", _write(save(swapped, metadata))
    yield "another value", _write(save({**tensors, first: tensors[first] + 1}, metadata))
    yield "a header of 10^10 bytes", _write((10**10).to_bytes(8, "little") + path.read_bytes()[8:])
    yield "a header of 2^64 bytes", _write(b"\xff" * 8 + path.read_bytes()[8:])
    header = {"a": {"dtype": "F32", "shape": [2**40, 2**22], "data_offsets": [0, 2**62]}}
    text = json.dumps(header).encode()
    yield "a tensor larger than any memory", _write(len(text).to_bytes(8, "little") + text)
    nested = b'{"a":' + b"[" * 100_000
    yield "a nested header", _write(len(nested).to_bytes(8, "little") + nested)
    if "lora_adapter_metadata" in metadata:
        for name in ("rank_pattern", "alpha_pattern"):
            settings = json.dumps({f"unet.{name}": {_BOMB: 4}})
            yield f"{name} without end", _write(save(tensors, {"lora_adapter_metadata": settings}))
        for text in ("[" * 100_000, "null", '{"unet.r": -1}', '{"unet.r": null}', '{"unet.lora_alpha": NaN}'):
            content = save(tensors, {"lora_adapter_metadata": text})
            yield f"settings {text[:30]}", _write(content)


def _filled(tensors: dict[str, torch.Tensor], key: str, value: float) -> dict[str, torch.Tensor]:
    changed = tensors[key].clone()
    if changed.is_floating_point() and changed.numel():
        changed.reshape(-1)[0] = value
    return {**tensors, key: changed}


def _of_json(path: Path, rng: random.Random) -> Iterator[tuple[str, Mutation]]:
    content = json.loads(path.read_text())
    yield "nested without end", _write(b"[" * 100_000)
    yield "nested values", _write(b'{"a":' * 50_000)
    for name, text in (("a list", "[]"), ("a number", "3"), ("null", "null"), ("a string", '"a"')):
        yield f"{name} in place of everything", _write(text.encode())
    yield "another encoding", _write(json.dumps(content).encode("utf-16"))
    yield "bytes of cp1252", _write(b'{"name": "caf\xe9"}')
    yield "a number that is none", _write(json.dumps(content).encode()[:-1] + b', "more": NaN}')
    if not isinstance(content, dict) or not content:
        return
    key = rng.choice(sorted(content))
    twice = json.dumps({key: None})[1:-1] + ", " + json.dumps(content)[1:]
    yield f"{key!r} twice", _write(("{" + twice).encode())
    yield "an unknown entry", _write(json.dumps({**content, "unknown_entry": 1}).encode())
    for key in sorted(content):
        others = [None, -1, 10**18, "words", [], {}, True, 1.5, float("nan")]
        chosen = rng.sample(others, 4)
        for value in chosen:
            if json.dumps(value) != json.dumps(content[key]):
                yield f"{key} = {value!r}", _write(json.dumps({**content, key: value}).encode())
        yield (f"without {key}", _write(json.dumps({k: v for k, v in content.items() if k != key}).encode()))
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        if key in content:
            yield f"{key} without end", _write(json.dumps({**content, key: _BOMB}).encode())


def _of_pickles(path: Path) -> Iterator[tuple[str, Mutation]]:
    tree = torch.load(path, weights_only=True)

    def saved(value: Any) -> Mutation:
        return lambda p: torch.save(value, p)

    yield "code beside the tensors", lambda p: torch.save({"a": tree, "b": Runs(_marker(p))}, p)
    for name, value in (("NaN", float("nan")), ("infinity", float("inf"))):
        yield name, saved(_map(tree, lambda t, v=value: torch.full_like(t, v)))
    yield "no tensors", saved({})
    yield "words", saved("words")
    yield "other shapes", saved(_map(tree, lambda t: t[..., :-1].clone()))
    yield "integers", saved(_map(tree, lambda t: t.int()))
    yield ("four bytes as a terabyte", saved(_map(tree, lambda t: torch.ones(1).expand(2**20, 2**18))))
    yield "sparse tensors", saved(_map(tree, lambda t: t.to_sparse()))
    yield "a zip file that unpacks to more", _packed


def _map(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map(value, change) for key, value in tree.items()}
    return [_map(value, change) for value in tree] if isinstance(tree, list) else tree


def _packed(path: Path) -> None:
    with zipfile.ZipFile(path) as plain:
        entries = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for name, content in entries.items():
            packed.writestr(name, content if "data/" not in name else bytes(len(content)) * 100)


def _of_text(path: Path) -> Iterator[tuple[str, Mutation]]:
    text = path.read_text()
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        yield f"in {encoding}", _write(text.encode(encoding))
    yield "UTF-16 without its mark", _write(text.encode("utf-16-le"))
    yield "bytes of cp1252", _write(text.encode() + "a dog\u2019s life\n".encode("cp1252"))
    yield "a zero byte", _write(text.encode() + b"a\x00b\n")
    if path.suffix == ".yaml":
        yield "nested without end", _write(b"a: " + b"[" * 20_000)
        yield "aliases that multiply", _write(_LAUGHS)
        yield "a key twice", _write(text.encode() + b"seed: 4\n")
        yield "a Python object", _write(b"a: !!python/object/apply:os.mkdir [code_ran]\n")
        yield "a list", _write(b"- a\n")
        yield "digits in sixties", _write(b"a: " + b"1" + b":1" * 50_000 + b"\n")


_LAUGHS = b"a0: &a0 [x, x]\n" + b"".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]\n".encode() for i in range(1, 20)
)
