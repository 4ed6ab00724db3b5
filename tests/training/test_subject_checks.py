"""Bad input of the training script: found before any long work, with nothing left behind."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from diffusers import DDIMScheduler

from diffusers_ext.nullspace.collect import collect_statistics
from diffusers_ext.nullspace.statistics import FeatureStatistics
from diffusers_ext.training.nullspace import run as train_nullspace_dreambooth
from diffusers_ext.training.nullspace import subject
from diffusers_ext.training.nullspace.run import check_args, main, parse_args, settle_resolution, subject_settings
from diffusers_ext.training.run.setup import run_facts
from examples.digits.check_model import load_pipeline
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_pipelines import pixart_pipeline

PRIOR = {"with_prior_preservation": True, "class_data_dir": "class", "class_prompt": "a digit"}
NUMBERS = [
    ("rank", 0, "at least 1, got 0"),
    ("statistics_batch_size", 0, "at least 1, got 0"),
    ("num_class_images", 0, "at least 1, got 0"),
    ("eps", 0.0, "positive, got 0.0"),
    ("nullspace_threshold", -1.0, "positive, got -1.0"),
    ("snr_gamma", 0.0, "positive, got 0.0"),
    ("null_energy", 1.0, r"in \[0, 1\), got 1.0"),
    ("lora_dropout", 1.0, r"in \[0, 1\), got 1.0"),
    ("preservation_weight", -1.0, "at least 0, got -1.0"),
    ("prior_loss_weight", float("nan"), "at least 0, got nan"),
    ("resolution", 36, "a multiple of 8, got 36"),
    ("resolution", 0, "a multiple of 8, got 0"),
    ("learning_rate", 0.0, "positive, got 0.0"),
    ("train_batch_size", 0, "at least 1, got 0"),
]
COMBINATIONS = [
    ({"use_dora": True}, "`use_dora` must be False, got True: DoRA"),
    ({"lora_bias": "all"}, "`bias` must be 'none', got 'all'"),
    ({"instance_prompt": " "}, "`instance_prompt` must not be empty, got ' '"),
    ({"features": ["k", "x"]}, r"`features` must be among .* got \['x'\]"),
    ({"cross_attention_layers": ["0", "two"]}, "`cross_attention_layers` must be 'all' or indices"),
    ({"full_finetune": True, "directions": "plain"}, "must be constrained, got `--directions plain`"),
    (
        {"full_finetune": True, "adam_weight_decay": 0.01},
        "`adam_weight_decay` must be 0 with `--full_finetune`, got 0.01",
    ),
    ({"with_prior_preservation": True}, "`--class_data_dir` and `--class_prompt` must be given"),
    ({**PRIOR, "class_data_dir": __file__}, "`class_data_dir` must be a folder, got the file"),
    ({"knowledge_prompts": "missing.txt"}, "must be a text file .*missing.txt: no such file"),
    ({"knowledge_prompts": None}, "`--statistics` or `--knowledge_prompts` must be given"),
    ({"statistics": "tests"}, "`statistics` must be a folder with config.json, got tests without"),
    ({"instance_data_dir": "missing"}, "`instance_data_dir` must be a folder of pictures, got missing"),
    ({"instance_data_dir": "tests"}, "`instance_data_dir` must hold pictures .*, got none in tests"),
    ({"resume_from_checkpoint": "latest"}, "must name a checkpoint, got 'latest' but .* holds none"),
    ({"resume_from_checkpoint": "gone"}, "must name a complete checkpoint folder, got 'gone'"),
]  # fmt: skip


@pytest.fixture
def fails(subject_line, tmp_path, fresh_accelerator):
    """Runs the script on bad input: the error is as told and the output folder does not appear."""

    def run(message: str, error: type[Exception] = ValueError, **arguments) -> None:
        with pytest.raises(error, match=message):
            main(parse_args(subject_line(**arguments)))
        assert not (tmp_path / "out").exists()

    return run


@pytest.fixture
def fails_before_loading(fails, monkeypatch):
    def load(*_: object) -> None:
        raise AssertionError("The model must not be loaded.")

    monkeypatch.setattr(train_nullspace_dreambooth, "load_pipeline", load)
    return fails


@pytest.mark.parametrize(("name", "value", "rule"), NUMBERS)
def test_wrong_numbers(fails_before_loading, name, value, rule):
    fails_before_loading(f"`{name}` must be {rule}", **{name: value})


@pytest.mark.parametrize(("arguments", "message"), COMBINATIONS)
def test_wrong_arguments(fails_before_loading, arguments, message):
    fails_before_loading(message, **arguments)


def test_files_that_hold_nothing(fails_before_loading, tmp_path, pictures):
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing but a comment\n\n")
    fails_before_loading("must hold at least one prompt, got .*empty.txt", knowledge_prompts=empty)
    folder = tmp_path / "broken"
    folder.mkdir()
    content = (pictures / "0.png").read_bytes()
    for broken in (b"", b"text", content[: len(content) // 2]):
        (folder / "a.png").write_bytes(broken)
        message = "a.png must be a picture, got (an empty file|a file that is none or cannot be read)"
        fails_before_loading(message, instance_data_dir=folder)


def test_results_do_not_go_among_the_pictures(subject_line, pictures):
    before = sorted(pictures.iterdir())
    with pytest.raises(ValueError, match="`output_dir` must not be the folder of the pictures"):
        main(parse_args(subject_line(output_dir=pictures)))
    assert sorted(pictures.iterdir()) == before


def test_plain_directions_need_no_knowledge(subject_line):
    check_args(parse_args(subject_line(directions="plain", knowledge_prompts=None)))


@pytest.mark.parametrize("directions", ["generalized", "plain"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cross_attention_layers": [0, 7]}, r"'all' or indices from 0 to 6, got \[0, 7\]"),
        ({"features": ["ff.in"], "cross_attention_layers": [-1]}, "indices from 0 to 6"),
        ({"instance_prompt": "sks " * 20}, r"fit the tokenizer \(16 tokens\), got 22 tokens"),
        ({"validation_prompt": "sks " * 20}, "fit the tokenizer .* got 22 tokens in 'sks sks"),
        ({**PRIOR, "class_prompt": "one " * 20}, "fit the tokenizer .* got 22 tokens in 'one one"),
        ({"negative_prompt": "red " * 15}, "fit the tokenizer .* got 17 tokens in 'red red"),
    ],
)
def test_what_does_not_fit_the_model(fails, monkeypatch, directions, arguments, message):
    def collect(*_: object, **__: object) -> None:
        raise AssertionError("Nothing must be collected.")

    monkeypatch.setattr("diffusers_ext.training.nullspace.knowledge.collect_statistics", collect)
    fails(message, directions=directions, **arguments)


def test_long_knowledge(fails, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("a red seven\n" + "two " * 16)
    fails("fit the tokenizer .* got 18 tokens in 'two two", knowledge_prompts=long)
    fails("fit the tokenizer .* got 22 tokens", other_instance_prompts="zwx " * 20)


def test_statistics_of_another_model(fails, tmp_path):
    other = random_digits_pipeline()
    for features, name in (("k", "text_encoder"), ("q", "denoiser")):
        if features == "q":
            other.text_encoder = load_pipeline().text_encoder
        folder = tmp_path / features
        collect_statistics(
            other, ["a red seven"], features=features, num_inference_steps=1, show_progress=False
        ).save_pretrained(folder)
        for full in (None, True):
            fails(f"must be of the same {name}", statistics=folder, full_finetune=full)


def test_damaged_statistics(fails, tmp_path):
    folder = tmp_path / "statistics"
    pipeline = load_pipeline()
    collect_statistics(pipeline, ["a red one"], show_progress=False).save_pretrained(folder)
    weights = folder / FeatureStatistics.weights_name
    weights.write_bytes(weights.read_bytes()[:-8])
    fails("must have SHA-256 .* truncated or was altered", statistics=folder)
    weights.unlink()
    fails(f"must hold {weights.name}", statistics=folder)


def test_no_null_space_or_no_news_stop_before_class_pictures_are_drawn(fails, tmp_path, monkeypatch):
    def draw(*_: object, **__: object) -> None:
        raise AssertionError("No picture must be drawn.")

    monkeypatch.setattr(subject, "make_class_images", draw)
    prior = {**PRIOR, "class_data_dir": tmp_path / "class"}
    fails("null space of 'text' must have at least one dimension", **prior,
          full_finetune=True, nullspace_threshold=1e-30)  # fmt: skip
    fails("must not be a preserved one", **prior, instance_prompt="a red seven")
    fails("`rank` must be from 1 to the width 128, got 129", **prior, rank=129)


def test_the_resolution_is_the_models_own_unless_given(subject_line, fresh_accelerator, caplog):
    PartialState()
    sdxl = SimpleNamespace(config=SimpleNamespace(sample_size=128))
    digits = load_pipeline().unet
    for unet, given, settled in ((digits, None, 32), (sdxl, None, 1024), (sdxl, 512, 512)):
        factor = 4 if settled == 32 else 8
        args = parse_args(subject_line(resolution=given))
        settle_resolution(args, SimpleNamespace(unet=unet, vae_scale_factor=factor))
        assert args.resolution == settled
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "--resolution is 512, the model's own is 1024" in caplog.text
    wide = SimpleNamespace(config=SimpleNamespace(sample_size=[60, 90]))
    args = parse_args(subject_line(resolution=None))
    with pytest.raises(ValueError, match="`resolution` must be given for a model without"):
        settle_resolution(args, SimpleNamespace(unet=wide, vae_scale_factor=8))


def test_other_pipelines_and_predictions(fails, tmp_path):
    pixart_pipeline().save_pretrained(tmp_path / "pixart")
    path = {"pretrained_model_name_or_path": tmp_path / "pixart"}
    fails("must be a Stable Diffusion or SDXL or .* pipeline, got PixArt", **path)
    pipeline = load_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="sample")
    pipeline.save_pretrained(tmp_path / "sample")
    path = {"pretrained_model_name_or_path": tmp_path / "sample"}
    fails("`prediction_type` of the scheduler must be 'epsilon' or .* got 'sample'", **path)


def test_a_diverging_run_leaves_its_last_checkpoint_and_no_result(teach, tmp_path, monkeypatch):
    make_loss = train_nullspace_dreambooth.make_loss

    def broken(*arguments):
        loss, calls = make_loss(*arguments), []

        def diverge(model, batch, generator):
            calls.append(None)
            losses = loss(model, batch, generator)
            return losses if len(calls) < 4 else {**losses, "loss": losses["loss"] * torch.nan}

        return diverge

    expected = teach("expected", checkpointing_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(train_nullspace_dreambooth, "make_loss", broken)
        with pytest.raises(FloatingPointError, match="loss must stay finite, got nan before step 4"):
            teach(checkpointing_steps=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
    resumed = teach(checkpointing_steps=2, resume_from_checkpoint="latest")
    name = "pytorch_lora_weights.safetensors"
    assert (resumed / name).read_bytes() == (expected / name).read_bytes()


def test_every_setting_that_decides_what_comes_out_is_compared_on_resume(subject_line):
    flow = {"scope": "all", "weighting_scheme": "mode", "guidance_embedding": 2.0}  # compared where they are given
    args = parse_args(subject_line(**PRIOR, **flow, aspect_buckets=True))
    args.optimizer, args.quantization = "prodigy", "bnb_8bit"
    decided = subject_settings(args)
    elsewhere = {
        "config", "pretrained_model_name_or_path", "single_file_config", "revision", "variant", "output_dir",
        "instance_data_dir", "class_data_dir", "num_class_images", "knowledge_prompts",
        "other_instance_prompts", "features", "cross_attention_layers", "negative_prompt",
        "no_sub_phrases", "num_inference_steps", "guidance_scale", "statistics_batch_size",
        "statistics", "enable", "use_dora", "lora_bias", "resume_from_checkpoint",
    }  # fmt: skip
    reporting = {"report_to", "logging_dir", "logging_steps", "dataloader_num_workers"}
    harmless = {n for n in vars(args) if n.startswith(("hub_", "push_", "checkpoint", "valid"))}
    harmless |= {"num_validation_images", "max_train_steps", "overwrite_output_dir", "traceback"}
    # Other ways to compute the same.
    harmless |= {
        "enable_xformers_memory_efficient_attention",
        "compile_model",
        "channels_last",
        "dataloader_pin_memory",
    }
    compared = decided.keys() | run_facts(args).keys()
    assert {one.name for one in fields(args)} - compared == elsewhere | reporting | harmless
