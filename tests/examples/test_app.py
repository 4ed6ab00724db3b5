"""The app through its client, on tiny models and on the loopback address alone."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
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

from examples.app import build_page
from examples.app_drawing import SideBySide, Sources


ROOT = Path(__file__).resolve().parents[2]
LORA_FILE = "pytorch_lora_weights.safetensors"
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
        app = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            while f"127.0.0.1:{port}" not in log.read_text():
                assert app.poll() is None, log.read_text()
                time.sleep(0.1)
            address = f"http://127.0.0.1:{port}/"
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
        ({"prompt": "  "}, "`prompt` must say what to draw, got an empty text"),
        ({"seed": -1}, "`seed` must be from 0 to 4294967295, got -1"),
        ({"seed": None}, "`seed` must be from 0 to 4294967295, got None"),
        ({"strength": 9.0}, "9.0 is greater than maximum value 2"),
        ({"tool": "Golden eggs"}, "Golden eggs"),
    ],
)
def test_bad_input_is_shown_as_our_message(client, given, message):
    with pytest.raises(AppError, match=message):
        draw(client, **{"tool": "Golden noise", **given})


def test_numbers_are_checked_without_the_page_too():
    with pytest.raises(ValueError, match=r"`strength` must be from 0 to 2\.0, got nan"):
        SideBySide(Sources()).draw("Golden noise", "a red seven", 0, float("nan"))
    with pytest.raises(ValueError, match="`tool` must be one of .*, got 'Golden eggs'"):
        SideBySide(Sources()).draw("Golden eggs", "a red seven", 0, 1.0)


def test_a_lora_that_does_not_load_leaves_nothing_behind(arguments, tmp_path):
    found = dict(word[2:].split("=") for word in arguments)
    weights = load_file(Path(found["lora"], LORA_FILE))
    save_file(
        {name: tensor[:, :1].clone() for name, tensor in weights.items()}, tmp_path / LORA_FILE
    )
    sources = Sources(
        image_model=found["pretrained_model_name_or_path"],
        lora=str(tmp_path),
        num_inference_steps=1,
    )
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
    assert "fonts.googleapis" not in answer.text
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


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
    with pytest.raises(
        ValueError, match=r"The image model must be a pipeline of .* got a CogVideo"
    ):
        side_by_side.draw("Golden noise", "a red seven", 0, 1.0)
