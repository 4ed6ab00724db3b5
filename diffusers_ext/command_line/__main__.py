"""`python -m diffusers_ext.command_line` is `diffusers-ext`."""

from __future__ import annotations

import sys

from diffusers_ext.command_line.main import main

if __name__ == "__main__":
    sys.exit(main())
