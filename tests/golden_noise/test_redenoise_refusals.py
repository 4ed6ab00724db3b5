from __future__ import annotations

import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_ext.golden_noise.redenoise import encode_prompts, redenoise, redenoise_text
from tests.golden_noise.redenoise_cases import BUILDERS, PROMPTS, unit_noise


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("sd", {"num_steps": 1}, "`num_steps` must be an integer from 2 to 1000, got 1"),
        ("sd", {"num_steps": 1001}, "`num_steps` must be an integer from 2 to 1000, got 1001"),
        ("sd3", {"num_steps": 2.0}, "`num_steps` must be an integer from 2 to 1000, got 2.0"),
        ("sd", {"w1": float("nan")}, "`w1` must be a finite number, got nan"),
        ("sd", {"w2": float("inf")}, "`w2` must be a finite number, got inf"),
        ("flux_dev", {"legacy_inversion": True}, "`legacy_inversion` must be False for a flow"),
        ("sd", {"num_steps": 2, "legacy_inversion": True}, "`num_steps` must leave a level below"),
    ],
)
def test_impossible_settings_are_refused(family, arguments, message):
    pipeline = BUILDERS[family]()
    with pytest.raises(ValueError, match=message):
        redenoise_text(pipeline, unit_noise(pipeline), encode_prompts(pipeline, PROMPTS), **arguments)


def test_missing_negative_embeddings_are_found_before_the_first_call(monkeypatch):
    pipeline = BUILDERS["sd"]()
    embeds, noise = encode_prompts(pipeline, PROMPTS).prompt_embeds, unit_noise(pipeline)
    redenoise(pipeline, noise, embeds, w1=1.0, w2=1.0)
    monkeypatch.setattr(pipeline.unet, "forward", None)
    for scales in ({}, {"w1": 1.0, "w2": 2.0}):
        with pytest.raises(ValueError, match="`negative_prompt_embeds` must be given to a Stable"):
            redenoise(pipeline, noise, embeds, **scales)


def test_schedulers_without_the_models_levels_are_refused():
    for family in ("sd", "sd3"):
        pipeline = BUILDERS[family]()
        other = DDIMScheduler if family == "sd3" else FlowMatchEulerDiscreteScheduler
        pipeline.scheduler = other()
        with pytest.raises(ValueError, match=f"`pipeline.scheduler` must .*got a {other.__name__}"):
            redenoise_text(pipeline, unit_noise(pipeline), encode_prompts(pipeline, PROMPTS))
