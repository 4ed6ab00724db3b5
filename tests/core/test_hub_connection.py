"""No network: consoles and scripts end in one line within seconds."""

from __future__ import annotations

import socket

from tests.fresh_process import run_python

CODE = """
import contextlib, io, time
from diffusers_ext import FeatureStatistics, load_noise_model
from diffusers_ext.command_line.main import main
from diffusers_ext.core.sources import one_try_to_connect
from diffusers_ext.eraser.formats import read_eraser
from diffusers_ext.training.run.base_model import read_components
from types import SimpleNamespace
prompts, out = arguments[0], arguments[1] + ".safetensors"
model = ["--pretrained_model_name_or_path", "u/n"]
script = SimpleNamespace(pretrained_model_name_or_path="u/n", revision=None)
calls = [
    lambda: main(["collect", *model, "--knowledge_prompts", prompts, "--output_dir", out, "--quiet"]),
    lambda: main(["debleed", "u/n", "--statistics", "u/n", "--output_path", out, "--quiet"]),
    lambda: read_components(script),
    lambda: FeatureStatistics.from_pretrained("u/n"),
    lambda: read_eraser("u/n"),
    lambda: load_noise_model("u/n"),
]
found = []
for call in calls:
    said, start = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        with one_try_to_connect():
            try:
                call()
            except (ValueError, OSError, TypeError) as error:
                said.write(str(error))
    found.append([time.monotonic() - start, said.getvalue().strip().splitlines()[-1]])
print(json.dumps(found))
"""


def test_without_a_network_all_end_in_one_line_at_once(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: it refuses
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        (tmp_path / "p.txt").write_text("a red fox\n")
        found = run_python(
            CODE, tmp_path / "hf", tmp_path / "p.txt", tmp_path / "out", loopback=True,
            variables={"HF_ENDPOINT": endpoint},
        )  # fmt: skip
    for seconds, line in found:
        assert seconds < 5
        assert "got u/n: no such folder, and the Hub cannot be asked" in line
        assert "Check the connection" in line
