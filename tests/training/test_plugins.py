from __future__ import annotations

import sys

import pytest
from PIL import Image

from diffusers_ext.evaluation.judges import REWARDS, load_judge, load_reward
from diffusers_ext.rewards import CLIPScoreReward, PickScoreReward
from tests.tiny_clip import save_tiny_clip

MODULE = """
class Judge:
    def correct(self, images, prompts):
        return [True] * len(images)

class Callable:
    def __call__(self, images, prompts):
        return [False] * len(images)

def judge(images, prompts):
    return [prompt == "yes" for prompt in prompts]

ready = Judge()
number = 3

class Reward:
    name, version = "mine", "1"

    def score(self, images, prompts):
        return [float(len(prompt)) for prompt in prompts]

class Nameless:
    version, score = "1", 3

class Scoreless:
    name, version, score = "mine", "1", 3

reward = Reward()
"""


@pytest.fixture
def my_judges(tmp_path, monkeypatch):
    """Modules in the current folder."""
    (tmp_path / "my_judges.py").write_text(MODULE)
    (tmp_path / "my_broken_judges.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])
    yield
    sys.modules.pop("my_judges", None)


@pytest.mark.parametrize(
    ("attribute", "verdicts"),
    [
        ("Judge", [True, True]),
        ("Callable", [False, False]),
        ("judge", [True, False]),
        ("ready", [True, True]),
        ("ready.correct", [True, True]),
    ],
)
def test_classes_functions_and_objects_judge(my_judges, attribute, verdicts):
    assert load_judge(f"my_judges:{attribute}")([None, None], ["yes", "no"]) == verdicts


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_judges", "`subject_judge` must be `module:attribute`, got 'my_judges'"),
        ("my_judges:", "`subject_judge` must be `module:attribute`"),
        (":Judge", "`subject_judge` must be `module:attribute`"),
        ("no_such_judges:Judge", "must name a module, got 'no_such_judges'"),
        ("my_judges.inner:Judge", "must name a module, got 'my_judges.inner'"),
        ("my_judges:judges", "must name an attribute of my_judges, got 'judges'"),
        ("my_judges:number", "must be callable or have a method `correct`, got 3"),
    ],
)
def test_what_cannot_judge_is_refused(my_judges, spec, message):
    with pytest.raises(ValueError, match=message):
        load_judge(spec, "subject_judge")


def test_a_package_that_the_module_lacks_is_named(my_judges):
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load_judge("my_broken_judges:Judge")


@pytest.mark.parametrize("attribute", ["Reward", "reward"])
def test_a_reward_is_an_object_or_a_class_of_one(my_judges, attribute):
    reward = load_reward(f"my_judges:{attribute}", device="cuda", batch_size=None)
    assert reward.score([None], ["four"]) == [4.0]
    assert (reward.name, reward.version) == ("mine", "1")


def test_the_digits_reward_is_one_more():
    reward = load_reward("examples.digits.rewards:DigitsReward")
    assert reward.score([Image.new("RGB", (32, 32))], ["a red seven"]).shape == (1,)


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        ("hps", {}, r"`reward` must be one of \['hpsv2', 'pickscore', 'clip_score'\] or `module:"),
        ("my_judges:", {}, "`reward` must be `module:attribute`, got 'my_judges:'"),
        ("no_such_rewards:Reward", {}, "must name a module, got 'no_such_rewards'"),
        ("my_judges:rewards", {}, "must name an attribute of my_judges, got 'rewards'"),
        ("my_judges:Nameless", {}, r"a method `score` and .*Nameless.* without \['name'\]"),
        ("my_judges:Judge", {}, r"without \['score', 'name', 'version'\]"),
        ("my_judges:Scoreless", {}, "must have a method `score`"),
        ("my_judges:Reward", {"model": "x", "version": "1"}, r"take \['model', 'version'\], got"),
        ("my_judges:Reward", {"batch_size": 2}, r"to take \['batch_size'\], got 'my_judges:Rewa"),
    ],
)
def test_what_cannot_reward_is_refused(my_judges, spec, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec, **arguments)


def test_named_rewards_load_from_a_folder(tmp_path):
    folder = str(save_tiny_clip(tmp_path))
    reward = load_reward("clip_score", model=folder, batch_size=3, local_files_only=True)
    assert isinstance(reward, CLIPScoreReward)
    assert (reward.version, reward.batch_size) == (tmp_path.name, 3)
    reward = load_reward("pickscore", model=folder, version="tiny", processor=None)
    assert isinstance(reward, PickScoreReward)
    assert reward.version == "tiny"


def test_names_versions_and_devices_reach_the_reward(monkeypatch):
    seen = []
    for kind in REWARDS.values():
        monkeypatch.setattr(kind, "from_pretrained", lambda *a, **k: seen.append((a, k)))
    load_reward("hpsv2", version="v2.0", model="folder", device="cuda", batch_size=4)
    load_reward("hpsv2")
    assert seen == [(("folder",), {"version": "v2.0", "device": "cuda", "batch_size": 4}), ((), {"device": "cpu"})]
