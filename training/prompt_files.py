"""Files of prompts: text, one a line, and a column of a table; every text in them is a prompt."""

from __future__ import annotations

import os

from diffusers_ext.core.text_tables import read_prompt_texts


def read_prompt_file(path: str | os.PathLike, column: str = "prompt") -> list[str]:
    """Prompts of a text file, one a line, or of a column of a table.

    There are no comments and no missing values: `# 1`, `None`, `NA` and `null` are prompts. Only
    blank lines are passed over.

    Args:
        path: a name that ends in `.csv`, `.tsv`, `.json`, `.jsonl` or `.parquet` is read as a table,
            one that ends in `.txt` or has no ending as text.
        column: of a table.

    Raises:
        ValueError: no such file or column, another format, a broken row, or no prompt.
    """
    return read_prompt_texts(path, column, argument="prompt_file")
