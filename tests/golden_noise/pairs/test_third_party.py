from __future__ import annotations

import csv
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_ext.golden_noise.pairs.dataset import ThirdPartyPairDataset, open_pairs

SHAPE = (4, 8, 8)


def noises(seed: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, *SHAPE, generator=generator) for _ in range(count)]


def official_row(index: int, original: float, optimized: float, caption: str) -> dict:
    return {
        "index": index,
        "seed": 100 + index,
        "caption": caption,
        "original_score_list": [original, 0.5],
        "optimized_score_list": [optimized, 0.1],
    }


def write_official(folder: Path, below: str = "") -> None:
    """Three pairs: one that rises, one that falls (its file is not needed), one that rises."""
    (folder / below).mkdir(parents=True, exist_ok=True)
    rows = [
        official_row(0, 0.25, 0.26, 'a "big", red seven'),
        official_row(1, 0.25, 0.25, "the same"),
        official_row(2, 0.25, 0.30, "None"),
    ]
    for index in (0, 2):
        source, golden = noises(index, 2)
        arrays = (source.half().numpy(), golden.half().numpy(), np.array(index))
        np.savez(folder / below / f"{index}_{100 + index}.npz", *arrays)
    (folder / "SDXL_step_10_training.json").write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.mark.parametrize("below", ["", "pairs"])
def test_official_pairs(tmp_path, below):
    write_official(tmp_path, below)
    pairs = open_pairs(tmp_path)
    assert isinstance(pairs, ThirdPartyPairDataset)
    assert (len(pairs), pairs.num_steps, pairs.latent_shape) == (2, 1, SHAPE)
    assert pairs.facts is None
    assert pairs.prompts == ['a "big", red seven', "None"]
    source, golden = noises(2, 2)
    item = pickle.loads(pickle.dumps(pairs))[1]
    assert item["prompt"] == "None"
    assert item["noise"].dtype == item["golden"].dtype == torch.float32
    assert torch.equal(item["noise"], source[0].half().float())
    assert torch.equal(item["golden"], golden.half().float())


def write_csv(folder: Path, sequences: bool, prompts: tuple[str, ...] = ("NA", "a, b")) -> None:
    """Pairs or sequences of three as `metadata.csv` and `.pt` files."""
    below = "sequences" if sequences else "noises"
    (folder / below).mkdir(parents=True)
    target = "golden_sequence" if sequences else "target_noise"
    rows = []
    for index, prompt in enumerate(prompts):
        source, *states = noises(index, 4)
        files = [f"{below}/pair_{index:06d}_{kind}.pt" for kind in ("source", target)]
        torch.save(source, folder / files[0])
        torch.save(states if sequences else states[0], folder / files[1])
        names = ("prompt", "source_noise_file", f"{target}_file")
        rows.append({"id": index, **dict(zip(names, (prompt, *files))), "seed": 42 + index})
    with open(folder / "metadata.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("sequences", [False, True])
def test_pt_files_with_a_metadata_csv(tmp_path, sequences):
    write_csv(tmp_path, sequences)
    pairs = open_pairs(tmp_path)
    steps = 3 if sequences else 1
    assert (len(pairs), pairs.num_steps, pairs.latent_shape) == (2, steps, SHAPE)
    assert pairs.prompts == ["NA", "a, b"]
    source, *states = noises(1, 4)
    item = pickle.loads(pickle.dumps(pairs))[1]
    assert item["prompt"] == "a, b"
    assert torch.equal(item["noise"], source[0])
    assert torch.equal(item["golden"], torch.cat(states[:steps]))


class Trap:
    """A pickle that would run something."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle was executed')",))


def test_nothing_is_executed(tmp_path):
    write_csv(tmp_path / "pt", sequences=False)
    torch.save(Trap(), tmp_path / "pt/noises/pair_000000_target_noise.pt")
    with pytest.raises(ValueError, match="must hold nothing but tensors"):
        open_pairs(tmp_path / "pt")
    write_official(tmp_path / "npz")
    trap = np.array([Trap()], dtype=object)
    np.savez(tmp_path / "npz/0_100.npz", trap, trap)
    with pytest.raises(ValueError, match="must hold the arrays arr_0 and arr_1, got: "):
        open_pairs(tmp_path / "npz")
    scores = tmp_path / "npz/SDXL_step_10_training.json"
    scores.write_text("__import__('sys').exit()")
    with pytest.raises(ValueError, match="Line 1 of .* must hold JSON, got: "):
        open_pairs(tmp_path / "npz")


def test_a_damaged_compressed_file(tmp_path):
    write_official(tmp_path)
    path = tmp_path / "2_102.npz"
    with np.load(path) as arrays:
        np.savez_compressed(path, *(arrays[name] for name in ("arr_0", "arr_1")))
    content = bytearray(path.read_bytes())
    content[60:200] = bytes(255 - value for value in content[60:200])
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must hold the arrays arr_0 and arr_1, got: Error -3"):
        open_pairs(tmp_path)[1]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_truncated_files(tmp_path):
    write_csv(tmp_path / "pt", sequences=True)
    truncate(tmp_path / "pt/sequences/pair_000001_golden_sequence.pt")
    with pytest.raises(ValueError, match="pair_000001_golden_sequence.pt must be a whole file of `torch.save`"):
        open_pairs(tmp_path / "pt")[1]
    write_official(tmp_path / "npz")
    truncate(tmp_path / "npz/2_102.npz")
    with pytest.raises(ValueError, match="2_102.npz must hold the arrays arr_0 and arr_1"):
        open_pairs(tmp_path / "npz")[1]


def test_rows_without_their_file(tmp_path):
    write_csv(tmp_path / "pt", sequences=False)
    (tmp_path / "pt/noises/pair_000001_source.pt").unlink()
    with pytest.raises(ValueError, match="Row 2 of .* must name files below .*, got .*_source.pt"):
        open_pairs(tmp_path / "pt")
    write_official(tmp_path / "npz")
    (tmp_path / "npz/2_102.npz").unlink()
    with pytest.raises(ValueError, match="must hold 2_102.npz of line 3, got no such file"):
        open_pairs(tmp_path / "npz")


def test_files_outside_of_the_folder_are_not_read(tmp_path):
    write_csv(tmp_path / "pt", sequences=False)
    torch.save(noises(0, 1)[0], tmp_path / "outside.pt")
    path = tmp_path / "pt/metadata.csv"
    path.write_text(path.read_text().replace("noises/pair_000000_source.pt", "../outside.pt"))
    with pytest.raises(ValueError, match="Row 1 of .* must name files below .*outside.pt"):
        open_pairs(tmp_path / "pt")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "must hold at least one noise, got none"),
        ([torch.zeros(1, *SHAPE), "no"], "must hold noise tensors, got str"),
        (torch.zeros(2, *SHAPE), r"must hold noises of shape \(1, channels.*, got \(2, 4, 8, 8\)"),
        (torch.zeros(1, 16, 8, 8), r"shape \(1, 4, 8, 8\) like the first item, got \(1, 16, 8, 8"),
        (torch.full((1, *SHAPE), torch.nan), "must hold finite numbers, got NaN or infinity"),
    ],
)
def test_wrong_content(tmp_path, value, message):
    write_csv(tmp_path, sequences=False)
    torch.save(value, tmp_path / "noises/pair_000001_target_noise.pt")
    pairs = open_pairs(tmp_path)
    with pytest.raises(ValueError, match=message):
        pairs[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"index": 0}', r"Line 1 of .* must hold \['caption', 'optimized_score_list', "),
        ("[1]", "Line 1 of .* must hold"),
        (json.dumps(official_row(0, float("nan"), 1.0, "a")), "Line 1 of .* must hold JSON, got: the number NaN"),
        (json.dumps(official_row(0, 1.0, 0.5, "a")), "a pair whose score rises, got none"),
    ],
)
def test_wrong_scores(tmp_path, line, message):
    write_official(tmp_path)
    (tmp_path / "SDXL_step_10_training.json").write_text(line)
    with pytest.raises(ValueError, match=message):
        open_pairs(tmp_path)


def test_official_pairs_need_one_file_of_scores(tmp_path):
    write_official(tmp_path)
    (tmp_path / "more.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"must hold one .json or .jsonl file .* 'more.jsonl'\]"):
        open_pairs(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,prompt\n", r"must have the column 'source_noise_file', got \['id', 'prompt'\]"),
        ("", r"must have the columns .'prompt', 'source_noise_file'., got \[\]"),
        ("prompt,source_noise_file\na,b\n", "must have the columns of .*golden_sequence_file"),
        ("prompt,source_noise_file,target_noise_file\n", "must hold at least one pair, got none"),
        ("prompt,source_noise_file,target_noise_file\na\n", "Line 2 of .* must have 3 fields"),
        ("prompt,source_noise_file,target_noise_file\na,,\n", "Row 1 of .* must name files below"),
    ],
)
def test_wrong_metadata(tmp_path, text, message):
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_pairs(tmp_path)


def test_a_pipe_in_place_of_a_file_is_not_opened(tmp_path):
    write_official(tmp_path)
    for path in tmp_path.glob("*.npz"):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(ValueError, match=r"npz must be a file, got a pipe"):
        open_pairs(tmp_path)
