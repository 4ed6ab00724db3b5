from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_ext.evaluation.erasure_rows import judge_facts, judged
from diffusers_ext.evaluation.judges import CLIPDetector
from diffusers_ext.rewards import CLIPScoreReward
from tests.tiny_clip import save_tiny_clip

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


def clips_of(*frames: list[str]) -> np.ndarray:
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
    clips = clips_of(["red"] * 3, ["green", "green", "red"], ["red"] * 3)
    prompts = ["a Red car", "red, not green", "a greenish car"]
    found = judged(detector, clips, prompts)
    assert found["concept"] == [True, False, True]
    assert found["class"] == [True, False, None]
    assert found["shown"] == ["red", "green", "red"]
    first, second, third = found["concept_probability"]
    assert first == third > 0.9 > 0.4 > second > 0.2


def test_all_frames_count_unless_a_number_is_given(knowing):
    clips = clips_of(["red", "green", "green", "green", "red"])
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


def test_facts(clip):
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
def test_bad_input_is_refused(clip, arguments, message):
    with pytest.raises(ValueError, match=message):
        CLIPDetector(clip, **{"classes": CLASSES, "concept": "red", **arguments})
