from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from diffusers_ext.eraser.adapter.outputs import eraser_layers, erasers_disabled
from diffusers_ext.eraser.recipe import EraserTraining
from diffusers_ext.families.cogvideox import CogVideoX
from diffusers_ext.training.eraser.data import ClipSize, samples_facts
from diffusers_ext.training.eraser.run import add_eraser, make_data, train_eraser
from tests.tiny_cogvideox import tiny_video_pipeline
from tests.training.eraser_runs import tiny_prompts

RECIPE = EraserTraining(
    rank=8,
    preservation_weight=1.0,
    learning_rate=3e-3,
    max_train_steps=40,
    train_batch_size=4,
    num_target_trajectories=2,
    num_preserved_trajectories=4,
    num_inference_steps=4,
)
SIZE = ClipSize(9, 16, 16)
pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def data():
    return make_data(tiny_video_pipeline(), tiny_prompts(), RECIPE, SIZE)


def states_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_training_reaches_its_target_and_leaves_the_base_alone(data):
    pipeline = tiny_video_pipeline()
    before = states_of(pipeline.transformer)
    forward = pipeline.transformer.forward
    done = train_eraser(pipeline, tiny_prompts(), RECIPE, size=SIZE, data=data, concept="seven", adapter_name="x")
    transformer = pipeline.transformer
    # The random text encoder of transformers 4 has other weights, of which this learning rate erases 0.38.
    assert done.history[-1]["erased"] > (0.5 if transformers.__version__ >= "5" else 0.3)
    assert done.history[-1]["unlearning"] < done.history[0]["unlearning"]
    assert [entry["step"] for entry in done.history] == [10, 20, 30, 40]
    after = states_of(transformer)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert transformer.peft_config["x"].concept == "seven"
    assert not any(module.training for module in transformer.modules())
    assert not any(parameter.requires_grad for parameter in transformer.parameters())
    assert transformer.forward == forward
    sample = data.samples[0]["target"]
    inputs = {
        "hidden_states": sample["x_t"][None],
        "encoder_hidden_states": data.text.target[:1],
        "timestep": sample["t"][None],
        "image_rotary_emb": pipeline._prepare_rotary_positional_embeddings(16, 16, 3, "cpu"),
    }
    with torch.no_grad():
        erased = transformer(**inputs).sample
        with erasers_disabled(transformer):
            base = transformer(**inputs).sample
        plain = tiny_video_pipeline().transformer(**inputs).sample
    assert torch.equal(base, plain)
    assert not torch.equal(erased, base)


def test_a_run_is_a_function_of_its_seed(data):
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))
        pipeline = tiny_video_pipeline()
        recipe = dataclasses.replace(RECIPE, max_train_steps=3, seed=seed)
        train_eraser(pipeline, tiny_prompts(), recipe, size=SIZE, data=data)
        layers = eraser_layers(pipeline.transformer).values()
        results.append([layer.eraser_up["default"].weight for layer in layers])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1]))
    assert not any(torch.equal(a, b) for a, b in zip(results[0], results[2]))


def test_facts_tell_samples_apart(data):
    others = dataclasses.replace(RECIPE, sampling_guidance_scale=2.0)
    other = make_data(tiny_video_pipeline(), tiny_prompts(), others, SIZE)
    assert samples_facts(data.samples) != samples_facts(other.samples)
    assert samples_facts(data.samples)["length"] == len(data.samples)


def test_a_new_eraser_changes_nothing_and_does_not_touch_the_global_generator():
    pipeline = tiny_video_pipeline()
    state = torch.get_rng_state()
    parameters = add_eraser(pipeline.transformer, RECIPE, concept="seven", anchor_concept="digit")
    assert torch.equal(torch.get_rng_state(), state)
    trained = [p for p in pipeline.transformer.parameters() if p.requires_grad]
    assert {*map(id, trained)} == {*map(id, parameters)}
    assert sum(p.numel() for p in parameters) == 2 * (2 * 32 * 8 + 8 + 32)


def test_sizes_are_the_models_own_where_none_are_given():
    pipeline = tiny_video_pipeline()
    models = pipeline.transformer, pipeline.vae
    assert ClipSize.of_configs(CogVideoX(), *models) == SIZE
    assert ClipSize.of_configs(CogVideoX(), *models, num_frames=17, width=24) == (17, 16, 24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"localization_weight": 0.1}, "`concept` must be given where `localization_weight`"),
        ({"latents_source": "video"}, "`video_dir` must be given"),
    ],
)
def test_what_a_recipe_lacks(changes, message):
    recipe = dataclasses.replace(RECIPE, **changes)
    with pytest.raises(ValueError, match=message):
        train_eraser(tiny_video_pipeline(), tiny_prompts(), recipe, size=SIZE)
