"""Puts what `diffusers-ext demo` runs into the wheel; all else is said in setup.cfg."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# Below `diffusers_ext/demo_files`, laid out as here, where the demo is found as it is.
DEMO_FILES = (
    "benchmarks/__init__.py",
    "benchmarks/machine.py",
    "examples/__init__.py",
    "examples/arguments.py",
    "examples/demo*.py",
    "examples/report.css",
    "examples/report.html.jinja",
    "examples/digits/*.py",
    "examples/digits/model/**/*",
    "examples/digits_flux2/*.py",
    "examples/moving_digits/*.py",
    "examples/moving_digits/model/**/*",
    "examples/moving_digits_wan/*.py",
    "training/*.py",
)


class BuildWithDemo(build_py):
    """`build_py`, then a copy of the demo; an editable install finds it in the checkout."""

    def run(self) -> None:
        """Build modules and data, then copy."""
        super().run()
        if self.editable_mode:
            return
        for source, target in self.demo_files().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def demo_files(self) -> dict[str, str]:
        """`{source: target}`; `ValueError` where a pattern finds nothing."""
        folder, found = Path(self.build_lib, "diffusers_ext", "demo_files"), {}
        for pattern in DEMO_FILES:
            paths = [path for path in sorted(ROOT.glob(pattern)) if path.is_file()]
            if not paths:
                raise ValueError(f"`{pattern}` must find files of the demo in {ROOT}, got none.")
            found |= {str(path): str(folder / path.relative_to(ROOT)) for path in paths}
        return found

    def get_source_files(self) -> list[str]:
        """Also those of the demo, which a source distribution then has."""
        demo = [] if self.editable_mode else [Path(path).relative_to(ROOT).as_posix() for path in self.demo_files()]
        return [*super().get_source_files(), *demo]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Also those of the demo."""
        return [*super().get_outputs(include_bytecode), *([] if self.editable_mode else self.demo_files().values())]


setup(cmdclass={"build_py": BuildWithDemo})
