"""Trainings of an eraser of a tiny Wan, from prompts to the adapter's file and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from safetensors.torch import load_file

from diffusers_ext.eraser.adapter.outputs import eraser_layers
from diffusers_ext.eraser.attack import learn_revival_embeddings, revived_prompts
from diffusers_ext.eraser.batch import encode_video_prompts
from diffusers_ext.eraser.files import load_eraser
from diffusers_ext.training.eraser.data import ClipSize
from tests.tiny_current_pipelines import tiny_wan_pipeline
from tests.training.eraser_runs import eraser_line, read_report, train, write_eraser_files

pytestmark = pytest.mark.usefixtures("fresh_accelerator")
SIZE = {"num_frames": 5, "height": 32, "width": 32}
LOGGED = {"checkpointing_steps": 1, "logging_steps": 1}
WHOLE = {**SIZE, **LOGGED, "localization_weight": 0.1, "max_train_steps": 2, "lr_scheduler": "constant"}


def wan():
    """As the checkpoints have it, with UniPC."""
    pipeline = tiny_wan_pipeline()
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return pipeline


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_eraser_files(tmp_path_factory.mktemp("wan"), wan())


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    validation = {"validation_prompt": "a red seven", "validation_fps": 4}
    return train(files, tmp_path_factory.mktemp("out") / "eraser", **WHOLE, **validation)


def test_what_a_run_leaves_changes_the_stock_pipeline(trained):
    report = read_report(trained)
    assert [row["step"] for row in report["history"]] == [1, 2]
    config = json.loads((trained / "adapter_config.json").read_text())
    assert (config["concept"], config["in_features"]) == ("seven", 32)
    tensors = load_file(trained / "adapter_model.safetensors")
    assert any("blocks.1.attn2" in name for name in tensors)
    assert any(tensor.any() for name, tensor in tensors.items() if "eraser_up" in name)
    assert (trained / "validation" / "step-000002-prompt-0-video-0.gif").is_file()
    pipeline, clips = wan(), []
    for loaded in (False, True):
        if loaded:
            load_eraser(pipeline, trained)
        generator = torch.Generator().manual_seed(0)
        clips.append(
            pipeline("a red seven", **SIZE, num_inference_steps=2, generator=generator, output_type="pt").frames
        )
    assert not torch.equal(*clips)


def test_a_resumed_run_ends_with_the_same_weights(files, trained, tmp_path):
    folder = train(files, tmp_path / "out", **{**WHOLE, "max_train_steps": 1})
    train(files, folder, **WHOLE, resume_from_checkpoint="latest")
    assert (folder / "adapter_model.safetensors").read_bytes() == (trained / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        {"latents_source": "noise", "localization_weight": 0.1, "max_timestep": 700},
        {"on_policy_share": 0.5, "adversarial_share": 0.5, "adversarial_every": 1, "adversarial_steps": 1},
        {"auto_preserved_concepts": True, "preserved_concepts_file": None, "num_preserved_concepts": 2},
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "anchor_concept": "auto", "text_codebook_size": 8},
    ],
    ids=str,
)
def test_variants_learn_finite_weights(arguments, files, tmp_path):
    if "adversarial_steps" in arguments:
        arguments = {**arguments, "num_adversarial_embeddings": 2, "sampling_batch_size": 1, "train_batch_size": 2}
    folder = train(files, tmp_path / "out", **SIZE, **{"max_train_steps": 2, **arguments})
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in tensors.items() if "eraser_up" in name)
    codebook = tensors.get("base_model.model.text_codebook")
    size = arguments.get("text_codebook_size")  # of kept tokens, and as many of what target prompts become
    assert (codebook is None) if size is None else codebook.shape[:2] == (2 * size, 2)


def test_learned_embeddings_come_right_after_the_prompt(trained):
    pipeline = wan()
    load_eraser(pipeline, trained)
    size = ClipSize(**SIZE)
    velocity, shape = size.velocity(pipeline), size.latent_shape(pipeline)
    embeds = encode_video_prompts(pipeline, ["a red seven", "a seven"])
    lengths = embeds.any(2).sum(1).tolist()
    x_t = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    found = learn_revival_embeddings(velocity, x_t, torch.tensor([900, 400]), embeds, num_embeddings=3, steps=3)
    assert found.losses[-1] < found.losses[0]
    with revived_prompts(pipeline, found.embeddings):
        with torch.no_grad():
            longer, negative = pipeline.encode_prompt(["a red seven", "a seven"], ["", ""], max_sequence_length=16)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(longer[row, :length], embeds[row, :length])
        assert torch.equal(longer[row, length : length + 3], found.embeddings)
        assert not longer[row, length + 3 :].any()
    assert negative.shape == longer.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 6}, "`num_frames` must be a multiple of 4 plus 1 .* The nearest is 5"),
        ({"height": 24}, "`height` must be a positive multiple of 16"),
        ({"num_frames": None, "height": None, "width": None}, "at most 32 tokens along an axis"),
        ({"eraser_rank": 33}, "`eraser_rank` must be at most the model's width, 32"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_weights_are_loaded(arguments, message, files, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(files, tmp_path / "out", **{**SIZE, **arguments})


def test_the_script_has_both_names():
    from training import train_cogvideox_eraser, train_eraser

    assert train_cogvideox_eraser.main is train_eraser.main
    line = eraser_line(Path("files"), Path("out"))
    assert train_eraser.parse_args(line) == train_cogvideox_eraser.parse_args(line)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Files of a model with two transformers."""
    pipeline = wan()
    torch.manual_seed(1)
    second = type(pipeline.transformer).from_config(pipeline.transformer.config).eval()
    both = type(pipeline)(**{**pipeline.components, "transformer_2": second}, boundary_ratio=0.7)
    return write_eraser_files(tmp_path_factory.mktemp("two"), both)


def test_each_transformer_learns_at_its_timesteps_and_one_folder_is_left(two, tmp_path):
    kept = {"trajectories_dir": tmp_path / "kept", "num_inference_steps": 4}
    folder = train(two, tmp_path / "out", **{**WHOLE, **kept, "checkpointing_steps": 2, "max_train_steps": 3})
    history = read_report(folder)["history"]
    names = ("transformer", "transformer_2")
    assert [(row["transformer"], row["step"]) for row in history] == [(n, s) for n in names for s in (1, 2, 3)]
    for name, serves in zip(names, (lambda t: t >= 700, lambda t: t < 700)):
        rows = [load_file(path) for path in sorted((tmp_path / "kept" / name).glob("*/*.safetensors"))]
        assert len(rows) == 4
        assert all(serves(run["t"]).all() for run in rows)
    pipeline = DiffusionPipeline.from_pretrained(two / "base")
    pipeline.set_progress_bar_config(disable=True)
    load_eraser(pipeline, folder)
    trained = [eraser_layers(getattr(pipeline, name)) for name in names]
    ups = [next(iter(layers.values())).eraser_up["default"].weight for layers in trained]
    assert all(up.any() for up in ups)
    assert not torch.equal(*ups)
    # A run that is killed after the first part goes on with the second.
    resumed = tmp_path / "resumed"
    shutil.copytree(folder / "transformer", resumed / "transformer")
    train(
        two,
        resumed,
        **{**WHOLE, **kept, "checkpointing_steps": 2, "max_train_steps": 3},
        resume_from_checkpoint="latest",
    )
    assert read_report(resumed)["history"] == history
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be 'latest' for a model with several"):
        train(two, resumed, **WHOLE, resume_from_checkpoint="checkpoint-2")
