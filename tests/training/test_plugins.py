from __future__ import annotations

import sys

import pytest

from training.plugins import load_judge


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
