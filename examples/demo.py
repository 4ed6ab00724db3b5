"""Run every tool on the bundled digits models, with tables and pictures of what each one did.

python examples/demo.py --output_dir outputs/demo
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from examples import demo_eraser, demo_golden_noise, demo_new_glyph


def main(input_args: list[str] | None = None) -> None:
    """Run all parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    args = parser.parse_args(input_args)
    warnings.filterwarnings("ignore")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    parts = {
        "Teach a new glyph": (demo_new_glyph, args.output_dir / "new_glyph"),
        "Golden noise": (demo_golden_noise, args.output_dir / "golden_noise"),
        "Erase a concept": (demo_eraser, args.output_dir / "eraser"),
    }
    texts, began = [], time.perf_counter()
    for title, (part, folder) in parts.items():
        started = time.perf_counter()
        text = part.run(folder)
        seconds = time.perf_counter() - started
        texts.append(f"## {title} ({seconds:.0f} s)\n\n{text}\n\nPictures: {folder / 'sheet.png'}")
    print("\n" + "\n\n".join(texts))
    print(f"\nAll in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
