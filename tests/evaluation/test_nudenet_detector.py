from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffusers_ext.evaluation.erasure_rows import judge_facts, judged
from diffusers_ext.evaluation.judges import LENIENT, NudeNetDetector


class Session:
    """Red and green of what reaches the network; the release decides whether it is RGB or BGR."""

    def run(self, outputs: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [inputs["images"].mean(axis=(0, 2, 3))]


class Stub:
    """Sees breasts where there is red, feet where there is green; the score is the channel."""

    def __init__(self, swaps: bool = False, **settings: Any) -> None:
        self.settings, self.swaps, self.onnx_session = settings, swaps, Session()

    def detect(self, picture: np.ndarray) -> list[dict[str, Any]]:
        assert picture.flags.c_contiguous
        blob = (picture[:, :, ::-1] if self.swaps else picture).transpose(2, 0, 1)[None] / 255
        (found,) = self.onnx_session.run(None, {"images": blob})
        red, green, _ = found
        return [
            {"class": "FEMALE_BREAST_EXPOSED", "score": red, "box": [0, 0, 1, 1]},
            {"class": "FEET_EXPOSED", "score": green, "box": [0, 0, 1, 1]},
        ]


def clips_of(*reds: list[int], green: int = 0) -> np.ndarray:
    clips = np.zeros((len(reds), len(reds[0]), 4, 4, 3), dtype=np.uint8)
    clips[..., 0] = np.array(reds)[..., None, None]
    clips[..., 1] = green
    return clips


def test_a_frame_is_enough_and_the_share_tells_how_many():
    detector = NudeNetDetector(Stub(), version="3", threshold=0.5)
    found = judged(detector, clips_of([0, 200, 0, 200], [0, 0, 0, 100]), ["", ""])
    assert found == {"nudity": [True, False], "nude_frames": [0.5, 0.0]}


def test_labels_and_frames_decide():
    clips = clips_of([0, 0, 255, 0, 0], green=255)
    strict, lenient = (NudeNetDetector(Stub(), version="3", **given) for given in ({"frames": 2}, {"labels": LENIENT}))
    assert judged(strict, clips, [""]) == {"nudity": [False], "nude_frames": [0.0]}
    assert judged(lenient, clips, [""]) == {"nudity": [True], "nude_frames": [1.0]}


@pytest.mark.parametrize(("swaps", "order"), [(False, "rgb"), (True, "bgr")])
def test_the_network_gets_red_first_whatever_the_release_swaps(swaps, order):
    stub = Stub(swaps=swaps)
    session = stub.onnx_session
    detector = NudeNetDetector(stub, version="3", threshold=0.5)
    assert stub.onnx_session is session
    assert detector.facts["channel_order"] == order
    assert judged(detector, clips_of([200]), [""])["nudity"] == [True]
    with pytest.raises(ValueError, match="`channel_order` must be one of .* got 'grb'"):
        NudeNetDetector(stub, version="3", channel_order="grb")


def test_a_probe_that_cannot_tell_is_refused():
    stub = Stub()
    for broken in (None, SimpleNamespace(run=lambda outputs, inputs: 1 / 0)):
        stub.onnx_session = broken
        with pytest.raises((ValueError, ZeroDivisionError)):
            NudeNetDetector(stub, version="3")
        assert stub.onnx_session is broken
    assert NudeNetDetector(stub, version="3", channel_order="bgr").channel_order == "bgr"
    stub = Stub()
    stub.detect = lambda picture: stub.onnx_session.run(None, {"images": np.ones((1, 3, 4, 4))})
    with pytest.raises(ValueError, match="got channels of mean .* for a red one"):
        NudeNetDetector(stub, version="3")


def test_the_real_package_sees_a_face_best_in_its_true_colours():
    nudenet = pytest.importorskip("nudenet")
    photograph = pytest.importorskip("skimage.data").astronaut()
    detector = nudenet.NudeDetector()
    order = NudeNetDetector(detector, version="3").facts["channel_order"]
    given = {"rgb": photograph, "bgr": np.ascontiguousarray(photograph[:, :, ::-1])}
    scores = {name: detector.detect(picture)[0]["score"] for name, picture in given.items()}
    assert {d["class"] for d in detector.detect(given[order])} == {"FACE_FEMALE"}
    assert scores[order] > max(scores[name] for name in scores if name != order) + 0.05


def test_the_installed_package_with_its_version(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.4.2")
    monkeypatch.setitem(sys.modules, "nudenet", SimpleNamespace(NudeDetector=Stub))
    facts = judge_facts(NudeNetDetector.from_installed(threshold=0.3).correct)
    assert facts["name"] == "nudenet"
    assert (facts["version"], facts["threshold"], facts["model"]) == ("3.4.2", 0.3, "320n")
    assert "ANUS_EXPOSED" in facts["labels"]
    path = tmp_path / "640m.onnx"
    path.write_bytes(b"")
    detector = NudeNetDetector.from_installed(path, 640)
    assert detector.detector.settings == {"model_path": str(path), "inference_resolution": 640}
    assert detector.facts["model"] == "640m"
    with pytest.raises(ValueError, match="`model_path` must be an ONNX file, got nowhere"):
        NudeNetDetector.from_installed("nowhere")


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="must have the package `nudenet`.* `pip install"):
        NudeNetDetector.from_installed()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.1}, r"`threshold` must be in \[0.2, 1\], got 0.1"),
        ({"labels": []}, r"`labels` must be among .*, got \[\]"),
        ({"labels": ["FACE_FEMALE"]}, r"got \['FACE_FEMALE'\]"),
        ({"frames": 0}, "`frames` must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NudeNetDetector(Stub(), version="3", **arguments)
