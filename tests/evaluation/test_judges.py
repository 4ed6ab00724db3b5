from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_ext.evaluation.judges import (
    LENIENT,
    CLIPDetector,
    NudeNetDetector,
    find_concept_aspect,
    judge_facts,
    judged,
)
from diffusers_ext.rewards import CLIPScoreReward
from tests.tiny_clip import save_tiny_clip

CLIPS = np.zeros((2, 3, 4, 4, 3), dtype=np.uint8)
PROMPTS = ["a", "b"]


class Judge:
    name, version, facts, concept_aspect = "stub", "3", {"threshold": 0.5}, "digit"

    def correct(self, clips: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
        return {
            "digit": np.ma.array([True, False], mask=[False, True]),
            "distance": np.array([1.5, 2.0]),
            "reads_as": np.array(["one", "two"]),
        }


def test_values_are_plain_and_masked_ones_none():
    expected = {"digit": [True, None], "distance": [1.5, 2.0], "reads_as": ["one", "two"]}
    assert judged(Judge(), CLIPS, PROMPTS) == expected
    assert judged(Judge().correct, CLIPS, PROMPTS) == expected
    assert type(judged(Judge(), CLIPS, PROMPTS)["digit"][0]) is bool


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([True, False], "must give a dictionary of arrays, one value per clip, got list"),
        ({}, "must give a dictionary"),
        ({"digit": np.array([True])}, r"per clip \(2\) for 'digit', got shape \(1,\)"),
        ({"digit": np.array([1, 2])}, "for 'digit', got shape .* of int64"),
        ({"digit": np.array([None, "a"])}, "of object"),
        ({"far": np.array([1.0, np.nan])}, "must give finite figures, got NaN .* 'far'"),
        ({"motion": np.array([1.0, 2.0])}, r"must not use the names .*, got \['motion'\]"),
    ],
)
def test_other_answers_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        judged(lambda clips, prompts: given, CLIPS, PROMPTS)


def test_a_masked_figure_may_be_anything():
    hidden = np.ma.array([1.0, np.nan], mask=[False, True])
    assert judged(lambda *_: {"far": hidden}, CLIPS, PROMPTS) == {"far": [1.0, None]}


def test_facts_of_objects_and_functions():
    facts = {"name": "stub", "version": "3", "threshold": 0.5}
    assert judge_facts(Judge()) == facts
    assert judge_facts(Judge().correct) == facts
    assert judge_facts(find_concept_aspect) == {"name": "find_concept_aspect", "version": None}


def test_the_aspect_of_the_concept():
    assert find_concept_aspect(Judge().correct, None, ["color", "digit"]) == "digit"
    assert find_concept_aspect(Judge(), "color", ["color", "digit"]) == "color"
    assert find_concept_aspect(print, None, ["color"]) == "color"
    for judge, given in ((print, None), (Judge(), "shape")):
        with pytest.raises(ValueError, match=r"`concept_aspect` must be one of .*'color', 'digit'"):
            find_concept_aspect(judge, given, ["color", "digit"])


CLASSES = ["red", "green", "green light"]
PURE = {"red": (255, 0, 0), "green": (0, 255, 0)}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> CLIPScoreReward:
    return CLIPScoreReward.from_pretrained(save_tiny_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def knowing(clip, monkeypatch) -> CLIPScoreReward:
    """A CLIP whose features are a picture's channels, and of texts the channel that they name."""

    def texts(prompts: list[str]) -> torch.Tensor:
        return torch.tensor([[float(word in text) for word in PURE] + [0.1] for text in prompts])

    def images(pictures: list) -> torch.Tensor:
        return torch.tensor(np.stack([np.asarray(p).mean((0, 1)) / 255.0 for p in pictures])).float()

    monkeypatch.setattr(clip, "text_features", texts)
    monkeypatch.setattr(clip, "image_features", images)
    return clip


def clips_of_colors(*frames: list[str]) -> np.ndarray:
    colors = np.array([[PURE[name] for name in clip] for clip in frames], dtype=np.uint8)
    return np.tile(colors[:, :, None, None], (1, 1, 8, 8, 1))


def test_probabilities_are_clips_own_mean_over_frames(clip):
    detector = CLIPDetector(clip, ["red", "green", "blue"], "red", frames=3)
    rng = np.random.default_rng(0)
    clips = rng.integers(0, 256, (2, 5, 32, 32, 3), dtype=np.uint8)
    found = detector.probabilities(clips)
    texts = [f"a photo of {name}" for name in ("red", "green", "blue")]
    tokens = clip.tokenizer(texts, padding=True, return_tensors="pt")
    pixels = clip.image_processor(images=list(clips[1, [0, 2, 4]]), return_tensors="pt")
    with torch.no_grad():
        logits = clip.model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, **pixels
        ).logits_per_image
    assert torch.allclose(found[1], logits.softmax(1).mean(0), atol=1e-5)
    assert torch.allclose(found.sum(1), torch.ones(2))


def test_verdicts(knowing):
    detector = CLIPDetector(knowing, CLASSES[:2], "red")
    clips = clips_of_colors(["red"] * 3, ["green", "green", "red"], ["red"] * 3)
    prompts = ["a Red car", "red, not green", "a greenish car"]
    found = judged(detector, clips, prompts)
    assert found["concept"] == [True, False, True]
    assert found["class"] == [True, False, None]
    assert found["shown"] == ["red", "green", "red"]
    first, second, third = found["concept_probability"]
    assert first == third > 0.9 > 0.4 > second > 0.2


def test_all_frames_count_unless_a_number_is_given(knowing):
    clips = clips_of_colors(["red", "green", "green", "green", "red"])
    verdicts = [
        CLIPDetector(knowing, CLASSES[:2], "red", frames=frames).correct(clips, [""])["concept"][0]
        for frames in (None, 2)
    ]
    assert verdicts == [False, True]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a green light", "green light"),
        ("GREEN grass in red light", "green"),
        ("evergreen", None),
        ("red-green", "red"),
    ],
)
def test_the_class_of_a_prompt(clip, prompt, name):
    assert CLIPDetector(clip, CLASSES, "red")._named(prompt) == name


def test_facts_of_clip(clip):
    facts = judge_facts(CLIPDetector(clip, CLASSES, "red", template="a {}").correct)
    assert facts == {"name": "clip", "version": clip.version, "classes": CLASSES, "concept": "red",
                     "template": "a {}", "frames": 8}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ["red"]}, r"two different words at least, got \['red'\]"),
        ({"classes": "red"}, "`classes` must be two different words"),
        ({"classes": ["red", "Red"]}, "`classes` must be two different words"),
        ({"concept": "blue"}, "`concept` must be one of `classes`.* got 'blue'"),
        ({"template": "a photo"}, "`template` must hold '{}'"),
        ({"frames": 0}, "`frames` must be at least 1, got 0"),
    ],
)
def test_bad_classes_are_refused(clip, arguments, message):
    with pytest.raises(ValueError, match=message):
        CLIPDetector(clip, **{"classes": CLASSES, "concept": "red", **arguments})


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


def clips_of_reds(*reds: list[int], green: int = 0) -> np.ndarray:
    clips = np.zeros((len(reds), len(reds[0]), 4, 4, 3), dtype=np.uint8)
    clips[..., 0] = np.array(reds)[..., None, None]
    clips[..., 1] = green
    return clips


def test_a_frame_is_enough_and_the_share_tells_how_many():
    detector = NudeNetDetector(Stub(), version="3", threshold=0.5)
    found = judged(detector, clips_of_reds([0, 200, 0, 200], [0, 0, 0, 100]), ["", ""])
    assert found == {"nudity": [True, False], "nude_frames": [0.5, 0.0]}


def test_labels_and_frames_decide():
    clips = clips_of_reds([0, 0, 255, 0, 0], green=255)
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
    assert judged(detector, clips_of_reds([200]), [""])["nudity"] == [True]
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
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NudeNetDetector(Stub(), version="3", **arguments)
