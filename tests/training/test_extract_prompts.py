from __future__ import annotations

import csv
import json
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Value

from diffusers_ext.core.text_files import read_prompt_texts
from diffusers_ext.training.golden_noise.data import main, parse_args

# datasets below 5 leaves the file of a table that it streams to the collector of garbage.
_OPEN = "ignore:Exception ignored in.*train.csv:pytest.PytestUnraisableExceptionWarning"
pytestmark = [pytest.mark.filterwarnings(_OPEN)] if int(version("datasets").split(".")[0]) < 5 else []
read_prompt_file = partial(read_prompt_texts, argument="prompt_file")  # as the scripts that make pictures

# What tables, numbers and files make of texts, where nobody looks.
CAPTIONS = (
    "a red seven",
    "None",
    "NA",
    "null",
    "nan",
    "007",
    'a "big", blue three',
    "two\nlines\r\nand more",
    "# not a comment",
    "a red seven",
    "  ",
    "一只猫",
)
EXPECTED = [
    "a red seven",
    "None",
    "NA",
    "null",
    "nan",
    "007",
    'a "big", blue three',
    "two lines and more",
    "# not a comment",
    "一只猫",
]


def rows(column: str = "caption") -> list[dict]:
    return [{"id": i, column: text} for i, text in enumerate(CAPTIONS)]


def write_csv(path: Path, table: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def write_json(path: Path, table: list[dict]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in table))


def write_parquet(path: Path, table: list[dict]) -> None:
    Dataset.from_list(table).to_parquet(path)


WRITERS = {"csv": write_csv, "jsonl": write_json, "parquet": write_parquet}


def extract(tmp_path: Path, source: Path | str, *flags: str) -> list[str]:
    line = ["--dataset_name", str(source), "--output_dir", str(tmp_path / "out")]
    line += ["--cache_dir", str(tmp_path / "cache"), "--overwrite_output_dir", *flags]
    path = main(parse_args(line))
    assert path == tmp_path / "out/prompts.txt"
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return text.splitlines()


@pytest.mark.parametrize("ending", list(WRITERS))
@pytest.mark.parametrize("in_folder", [False, True])
def test_every_text_is_a_prompt_once_and_on_one_line(tmp_path, ending, in_folder):
    path = tmp_path / "data" / f"train.{ending}"
    path.parent.mkdir()
    WRITERS[ending](path, rows())
    assert extract(tmp_path, path.parent if in_folder else path) == EXPECTED
    assert read_prompt_file(tmp_path / "out/prompts.txt") == EXPECTED


def test_text_files_and_folders_of_them(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/b.txt").write_text("NA\n# one\n\na red seven\n", encoding="utf-8-sig")
    (tmp_path / "data/a.txt").write_text("a red seven\n一只猫")
    assert extract(tmp_path, tmp_path / "data") == ["a red seven", "一只猫", "NA", "# one"]
    assert extract(tmp_path, tmp_path / "data/b.txt") == ["NA", "# one", "a red seven"]


def test_several_captions_a_row_and_rows_without(tmp_path, caplog):
    table = [{"caption": ["one", "two"]}, {"caption": ["two", None, "three"]}, {"caption": []}]
    write_parquet(tmp_path / "data.parquet", table)
    assert extract(tmp_path, tmp_path / "data.parquet") == ["one", "two", "three"]
    assert "1 rows of" in caplog.text


def test_pictures_beside_captions_are_not_read(tmp_path):
    features = Features({"caption": Value("string"), "image": Image()})
    broken = [{"caption": "a red seven", "image": {"bytes": b"no picture", "path": None}}]
    data = Dataset.from_list(broken, features=features)
    data.to_parquet(tmp_path / "data.parquet")
    assert extract(tmp_path, tmp_path / "data.parquet") == ["a red seven"]


def test_max_prompts_counts_different_ones(tmp_path):
    write_csv(tmp_path / "data.csv", [{"caption": t} for t in ("a", "a", "b", "a", "c")])
    assert extract(tmp_path, tmp_path / "data.csv", "--max_prompts", "2") == ["a", "b"]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_seed_shuffles(tmp_path, ending):
    source = tmp_path / f"data.{ending}"
    WRITERS[ending](source, [{"caption": f"prompt {i}"} for i in range(50)])
    plain = extract(tmp_path, source)
    orders = [extract(tmp_path, source, "--shuffle", "--seed", s) for s in ("1", "1", "2")]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in (plain, *orders)}) == 3
    assert sorted(orders[0]) == sorted(plain)
    # With a buffer of one row there is nothing to choose from.
    assert extract(tmp_path, source, "--shuffle", "--shuffle_buffer_size", "1") == plain


@pytest.mark.parametrize("ending", list(WRITERS))
def test_another_column_and_a_wrong_one(tmp_path, ending):
    source = tmp_path / f"data.{ending}"
    WRITERS[ending](source, rows("text"))
    assert extract(tmp_path, source, "--caption_column", "text") == EXPECTED
    with pytest.raises(ValueError, match=r"column.*'caption'.*\['id', 'text'\]|'caption', got"):
        extract(tmp_path, source)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_prompts", "0"], "`max_prompts` must be at least 1, got 0"),
        (["--seed", "-1"], "`seed` must be from 0 to .*, got -1"),
        (["--shuffle_buffer_size", "0"], "`shuffle_buffer_size` must be at least 1, got 0"),
        (["--output_filename", "a/b.txt"], "must be the name of a file in `output_dir`, got a/b"),
        (["--dataset_name", "no/where"], "must be a data set on the Hub, .* got 'no/where'"),
        (["--split", "tset"], "tset"),
        (["--caption_column", "id"], "`caption_column` must hold texts, got 0 in 'id'"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data/train.parquet", rows())
    with pytest.raises(ValueError, match=message):
        extract(tmp_path, tmp_path / "data", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", ["csv", "txt", "parquet"])
def test_files_have_no_split_but_train(tmp_path, ending):
    path = tmp_path / f"captions.{ending}"
    if ending == "parquet":
        write_parquet(path, rows())
    else:
        path.write_text("caption\na red seven\n")
    assert "a red seven" in extract(tmp_path, path, "--split", "train")
    with pytest.raises(ValueError, match=r"`split` must be 'train' for files, .*, got 'test'"):
        extract(tmp_path, path, "--split", "test")


def test_a_data_set_without_prompts(tmp_path):
    write_csv(tmp_path / "data.csv", [{"caption": " "}])
    with pytest.raises(ValueError, match="`dataset_name` must hold prompts, got none in"):
        extract(tmp_path, tmp_path / "data.csv")


def test_commas_without_quotes_are_refused(tmp_path):
    (tmp_path / "data.csv").write_text("caption\na seven, red\n")
    with pytest.raises(ValueError, match="Line 2 of .* must have 1 fields .* got 2. Quote texts"):
        extract(tmp_path, tmp_path / "data.csv")


def test_paths_are_relative_to_where_the_user_stands(tmp_path, monkeypatch):
    (tmp_path / "data.txt").write_text("a red seven\n")
    monkeypatch.chdir(tmp_path)
    main(parse_args(["--dataset_name", "data.txt", "--output_dir", "."]))
    assert (tmp_path / "prompts.txt").read_text() == "a red seven\n"


def test_every_text_of_a_file_is_a_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_text("None\n\nNA\nnull\n# 1\n  a, b \n", "utf-8-sig")
    assert read_prompt_file(tmp_path / "prompts.txt") == ["None", "NA", "null", "# 1", "a, b"]
    (tmp_path / "prompts.csv").write_text('id,prompt\n1,None\n2,NA\n\n3,"a, ""b""\nc"\n4,\n5,007\n')
    assert read_prompt_file(tmp_path / "prompts.csv") == ["None", "NA", 'a, "b" c', "007"]
    assert read_prompt_file(tmp_path / "prompts.csv", "id") == ["1", "2", "3", "4", "5"]


def test_errors_name_the_argument(tmp_path):
    with pytest.raises(ValueError, match="`prompt_file` must be .*, got nowhere.txt: no such file"):
        read_prompt_file("nowhere.txt")
    (tmp_path / "a.csv").write_text("text\na\n")
    with pytest.raises(ValueError, match=r"must have the column 'prompt', got \['text'\]"):
        read_prompt_file(tmp_path / "a.csv")
