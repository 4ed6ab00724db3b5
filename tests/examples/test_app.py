"""The app through its client, on tiny models and on the loopback address alone."""

from __future__ import annotations

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from diffusers_ext import save_eraser, save_lora
from tests.evaluation.golden_subjects import small_network
from tests.examples.picture_files import read_frames
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_erasers import add_random_eraser
from tests.tiny_lora import add_random_lora

if importlib.util.find_spec("gradio") is None and not os.environ.get("CI"):
    pytest.skip("gradio is not installed (extra `app`)", allow_module_level=True)

from gradio_client import Client
from gradio_client.exceptions import AppError

from examples.app import build_page, parse_args
from examples.app_drawing import SideBySide, Sources

ROOT = Path(__file__).resolve().parents[2]
LORA_FILE = "pytorch_lora_weights.safetensors"
ADDRESS = "127.0.0.2"  # another one than gradio's own
TOOLS = ["Taught subject", "Golden noise", "Erased concept"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """The command line for tiny models with random weights."""
    folder = tmp_path_factory.mktemp("models")
    pictures, clips = random_digits_pipeline(), tiny_video_pipeline()
    pictures.save_pretrained(folder / "pictures")
    clips.save_pretrained(folder / "clips")
    add_random_lora(pictures.unet)
    save_lora(type(pictures), pictures.unet, folder / "lora")
    add_random_eraser(clips.transformer)
    save_eraser(clips, folder / "eraser")
    small_network().save_pretrained(folder / "network")
    given = {"pretrained_model_name_or_path": "pictures", "video_model": "clips", "lora": "lora",
             "noise_model": "network", "eraser": "eraser"}  # fmt: skip
    return ["--num_inference_steps=2", *(f"--{n}={folder / value}" for n, value in given.items())]


@pytest.fixture(scope="module")
def client(arguments, tmp_path_factory):
    """Of the app in a process of its own: gradio leaves event loops open, which are errors here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("app") / "log.txt"
    command = [sys.executable, "examples/app.py", f"--server_port={port}", *arguments]
    with log.open("w") as output:
        app = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "GRADIO_SERVER_NAME": ADDRESS},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while f"{ADDRESS}:{port}" not in log.read_text():
                assert app.poll() is None, log.read_text()
                time.sleep(0.1)
            address = f"http://{ADDRESS}:{port}/"
            client = Client(address, download_files=str(log.parent), verbose=False)
            yield client
            client.close()
        finally:
            app.kill()
            app.wait()


def draw(client, tool, prompt="a red seven", seed=3, strength=1.0):
    return client.predict(tool, prompt, seed, strength, api_name="/draw")


@pytest.mark.parametrize("tool", TOOLS)
def test_the_tool_changes_the_result_by_its_strength_and_the_seed_decides_the_rest(client, tool):
    plain, drawn, *readings = draw(client, tool)
    again, same, *_ = draw(client, tool, strength=0.0)
    other, *_ = draw(client, tool, seed=4, strength=0.0)
    assert readings == ["", ""]  # the judges know the bundled models only
    assert read_frames(plain).shape == read_frames(drawn).shape
    assert read_frames(plain).shape[0] == (9 if tool == "Erased concept" else 1)
    assert read_frames(plain).shape[1] >= 320
    assert not np.array_equal(read_frames(plain), read_frames(drawn))
    assert np.array_equal(read_frames(plain), read_frames(again))
    assert np.array_equal(read_frames(plain), read_frames(same))
    assert not np.array_equal(read_frames(plain), read_frames(other))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "  "}, "The prompt is empty. Write what to draw."),
        ({"seed": -1}, "The seed must be a whole number from 0 to 4294967295, not -1"),
        ({"seed": None}, "The seed must be a whole number .* not an empty field"),
        ({"strength": 9.0}, "9.0 is greater than maximum value 2"),
        ({"tool": "Golden eggs"}, "Golden eggs"),
    ],
)
def test_bad_input_is_shown_as_our_message(client, given, message):
    with pytest.raises(AppError, match=message):
        draw(client, **{"tool": "Golden noise", **given})


def test_numbers_are_checked_without_the_page_too():
    with pytest.raises(ValueError, match=r"The strength must be from 0 to 2, not nan"):
        SideBySide(Sources()).draw("Golden noise", "a red seven", 0, float("nan"))
    with pytest.raises(ValueError, match="Choose one of these tools: .*; not 'Golden eggs'"):
        SideBySide(Sources()).draw("Golden eggs", "a red seven", 0, 1.0)


def test_a_lora_that_does_not_load_leaves_nothing_behind(arguments, tmp_path):
    found = dict(word[2:].split("=") for word in arguments)
    weights = load_file(Path(found["lora"], LORA_FILE))
    save_file({name: tensor[:, :1].clone() for name, tensor in weights.items()}, tmp_path / LORA_FILE)
    sources = Sources(image_model=found["pretrained_model_name_or_path"], lora=str(tmp_path), num_inference_steps=1)
    app, request = SideBySide(sources), ("Taught subject", "a red seven", 0, 1.0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        app.draw(*request)
    assert not any("lora" in name for name, _ in app.image_pipeline.unet.named_modules())
    app.sources = replace(sources, lora=found["lora"])
    plain, drawn = app.draw(*request)
    assert not np.array_equal(read_frames(plain.path), read_frames(drawn.path))


def test_only_drawing_is_in_the_api_and_the_browser_is_kept_from_other_hosts(client):
    import httpx

    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/draw"]
    answer = httpx.get(client.src)
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    page = answer.text
    if version("gradio").startswith("6.0."):  # whose page greets the hosts of fonts that it does not ask for
        page = re.sub(r'<link\s+rel="preconnect"[^>]*>', "", page)
    assert "fonts.googleapis" not in page
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_nothing_can_be_uploaded_and_large_requests_are_refused(client):
    import httpx

    assert httpx.get(client.src).status_code == 200
    for path in ("gradio_api/upload", "upload", "gradio_api/upload_progress"):
        answer = httpx.post(client.src + path, files={"files": b"x" * 10})
        assert answer.status_code == 403
        assert "Nothing can be uploaded" in answer.text
    call = f"{client.src}gradio_api/call/draw"
    assert httpx.post(call, json={"data": ["a" * 70_000]}).status_code == 413
    pieces = (b"a" * 1000 for _ in range(70))  # of a length that is not told
    assert httpx.post(call, content=pieces).status_code == 413


def test_the_lora_is_loaded_once_and_the_plain_picture_drawn_once(arguments, monkeypatch):
    found = dict(word[2:].split("=") for word in arguments)
    app = SideBySide(
        Sources(
            image_model=found["pretrained_model_name_or_path"],
            lora=found["lora"],
            noise_model=found["noise_model"],
            num_inference_steps=1,
        )
    )
    pipeline, calls = app.image_pipeline, []
    load, picture = pipeline.load_lora_weights, app._picture
    monkeypatch.setattr(pipeline, "load_lora_weights", lambda *a, **k: (calls.append("load"), load(*a, **k)))
    monkeypatch.setattr(SideBySide, "_picture", lambda self, *a, **k: (calls.append("draw"), picture(*a, **k))[1])
    first, drawn = app.draw("Taught subject", "a red seven", 0, 1.0)
    weaker, half = app.draw("Taught subject", "a red seven", 0, 0.5)
    assert calls == ["load", "draw", "draw", "draw"]
    assert first == weaker
    assert not np.array_equal(read_frames(drawn.path), read_frames(half.path))
    # The LoRA rests while another tool draws.
    app.plain.clear()
    other, _ = app.draw("Golden noise", "a red seven", 0, 1.0)
    plain = read_frames(first.path)
    assert np.array_equal(read_frames(other.path), plain)
    # A file that has gone is drawn again.
    Path(other.path).unlink()
    again, _ = app.draw("Taught subject", "a red seven", 0, 1.0)
    assert np.array_equal(read_frames(again.path), plain)


def test_the_address_is_gradios_own_unless_one_is_given(client):
    assert parse_args([]).server_name is None
    assert client.src.startswith(f"http://{ADDRESS}:")  # of GRADIO_SERVER_NAME


def test_the_page_has_a_button_for_another_seed(client):
    import httpx

    shown = [part["props"].get("value") for part in httpx.get(client.src + "config").json()["components"]]
    assert "Another seed" in shown


def test_tools_without_an_artifact_for_another_model_are_left_out(arguments):
    assert list(SideBySide(Sources()).tools) == TOOLS
    given = Sources(image_model="user/model", noise_model="user/network", video_model="user/video")
    assert list(SideBySide(given).tools) == ["Golden noise"]
    with pytest.raises(ValueError, match="The app must have something to show"):
        build_page(SideBySide(Sources(image_model="user/model", video_model="user/video")))


def test_pictures_of_earlier_drawings_are_deleted():
    side_by_side = SideBySide(Sources())
    for _ in range(25):
        side_by_side._next_file("png").touch()
    left = sorted(path.name for path in side_by_side.folder.iterdir())
    assert left == [f"{number:06d}.png" for number in range(6, 26)]
    folder = side_by_side.folder
    del side_by_side
    assert not folder.exists()


def test_the_image_model_must_be_of_a_known_pipeline(tmp_path):
    tiny_video_pipeline().save_pretrained(tmp_path)
    side_by_side = SideBySide(Sources(image_model=str(tmp_path), noise_model="user/network"))
    with pytest.raises(ValueError, match=r"The image model must be a pipeline of .* got a CogVideo"):
        side_by_side.draw("Golden noise", "a red seven", 0, 1.0)
