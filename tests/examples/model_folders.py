"""What is in the folder of a saved pipeline."""

from __future__ import annotations

from pathlib import Path

import transformers

_ONE_FILE = int(transformers.__version__.split(".")[0]) > 4


def model_files(folder: Path) -> set[Path]:
    """Names below the folder, without those of tokenizers where transformers 4 saves them, in files of its own."""
    names = {path.relative_to(folder) for path in folder.rglob("*")}
    return names if _ONE_FILE else {name for name in names if name.parent.name != "tokenizer"}
