from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffusers_ext
from diffusers_ext.golden_noise.networks.base import load_noise_model
from diffusers_ext.golden_noise.networks.files import read_network_config
from tests.golden_noise.golden_pipelines import NETWORKS
from tests.golden_noise.networks.test_base import assert_equal, small
from tests.golden_noise.shared_facts import upload_base

WEIGHTS = "diffusion_pytorch_model.safetensors"


def saved(folder, name: str = "model", **options):
    network = small(name)
    network.save_pretrained(folder, **options)
    return network


def change_config(folder, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_a_network_without_some_weights_is_refused(tmp_path):
    network = diffusers_ext.GoldenNoiseModel()
    network.save_pretrained(tmp_path / "net")
    weights = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, weights)
    with pytest.raises((ValueError, OSError)):
        load_noise_model(tmp_path / "net")


@pytest.mark.parametrize("name", NETWORKS)
def test_other_weights_than_the_configs_are_refused_with_the_files_name(tmp_path, name):
    network = saved(tmp_path, name)
    kept = network.state_dict()
    key = sorted(name for name, value in kept.items() if value.ndim)[0]
    for change, message in (
        ({key: None}, "1 missing"),
        ({"more.weight": torch.ones(1)}, "1 that are not expected"),
        ({key: kept[key].new_full(kept[key].shape, float("nan"))}, "NaN or infinity"),
        ({key: kept[key][..., None]}, "of shape"),
    ):
        altered = {k: v.contiguous() for k, v in (kept | change).items() if v is not None}
        save_file(altered, tmp_path / WEIGHTS)
        for arguments in ({}, {"low_cpu_mem_usage": False, "ignore_mismatched_sizes": True}):
            with pytest.raises(ValueError, match=f"{WEIGHTS}.*{message}"):
                load_noise_model(tmp_path, **arguments)
    save_file(dict(kept), tmp_path / WEIGHTS)  # as written before there were digests
    assert_equal(load_noise_model(tmp_path), network)


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "20KB"}])
def test_variants_and_shards_are_checked_too(tmp_path, options):
    network = saved(tmp_path, **options)
    variant = {k: v for k, v in options.items() if k == "variant"}
    assert_equal(load_noise_model(tmp_path, **variant), network)
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    content = bytearray(first.read_bytes())
    content[-1] ^= 1  # of a number; all shapes stay
    first.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{first.name} must have the contents that it was"):
        load_noise_model(tmp_path, **variant)
    first.unlink()
    with pytest.raises(ValueError, match="files that are there|must hold diffusion_pytorch"):
        load_noise_model(tmp_path, **variant)


def test_pickles_are_checked_too(tmp_path):
    network = saved(tmp_path, safe_serialization=False)
    assert_equal(load_noise_model(tmp_path, use_safetensors=False), network)
    torch.save({"embed.weight": torch.ones(2)}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin must hold the \d+ tensors"):
        load_noise_model(tmp_path, use_safetensors=False)


def test_files_hold_their_digests_in_order(tmp_path):
    saved(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    names = ["diffusers_ext.config_sha256", "diffusers_ext.sha256", "format"]
    assert list(header["__metadata__"]) == names
    first = (tmp_path / WEIGHTS).read_bytes()
    saved(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == first


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("model", "num_layers", 300_000, "`num_layers` must be .* got 300000 in .*config"),
        ("npnet", "swin_depths", [300_000], "`swin_depths` must be"),
        ("rnn", "cnn_num_blocks", [1] * 9999, "`cnn_num_blocks` must be"),
        ("transformer", "num_decoder_layers", "3", "`num_decoder_layers` must be .* got '3'"),
        ("model", "width", 10**6, "of shape"),
        ("model", "width", 10**30, "must describe a GoldenNoiseModel"),
        ("model", "num_heads", 0, "must describe a GoldenNoiseModel"),
        ("model", "num_heads", 4, "the digest in its metadata does not fit"),
    ],
)
def test_a_config_of_more_than_the_weights_is_refused_before_memory_is_taken(tmp_path, name, field, value, message):
    saved(tmp_path, name)
    change_config(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=message):
        load_noise_model(tmp_path)


def test_settings_are_changed_by_keywords(tmp_path):
    saved(tmp_path, "npnet")
    assert load_noise_model(tmp_path, svd_signs="backend").config.svd_signs == "backend"


def test_headers_of_any_length_are_refused(tmp_path):
    saved(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", 10**10) + b"{}")
    with pytest.raises(ValueError, match=f"{WEIGHTS} must be a whole safetensors file"):
        load_noise_model(tmp_path)


def test_indices_name_files_beside_them(tmp_path):
    saved(tmp_path)
    for index in ('{"weight_map": {"a": "../x.safetensors"}}', "[]", "[" * 100_000):
        (tmp_path / f"{WEIGHTS}.index.json").write_text(index)
        with pytest.raises(ValueError, match=rf"{WEIGHTS}\.index\.json must"):
            load_noise_model(tmp_path)


@pytest.mark.parametrize("name", NETWORKS)
def test_unknown_keywords_are_refused_for_a_local_folder(tmp_path, name):
    network = saved(tmp_path, name)
    for load in (load_noise_model, type(network).from_pretrained):
        with pytest.raises(TypeError, match="'subfoldr'.*Did you mean 'subfolder'"):
            load(tmp_path, subfoldr="a")


WANTED = "`pretrained_model_name_or_path` must be a folder or Hub name of a golden-noise network, "


def test_folders_without_a_config(tmp_path):
    with pytest.raises(ValueError, match=WANTED + "got .*: there is no config.json in it"):
        read_network_config(tmp_path, {})
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_network_config(tmp_path, {"dtype": None}) == {"a": 1}
    # diffusers would take the config of the root for a subfolder that is not there.
    with pytest.raises(ValueError, match="there is no noise/config.json in it"):
        read_network_config(tmp_path, {"subfolder": "noise"})


def test_names_that_lead_nowhere(hub, tmp_path):
    upload_base()
    for source, arguments, message in (
        ("/no/such/folder", {}, WANTED + "got /no/such/folder: no such folder"),
        ("tester/nothing", {}, WANTED + "got tester/nothing: no such folder, and no such repos"),
        ("tester/base", {}, WANTED + "got tester/base: there is no config.json in it"),
        ("tester/base", {"revision": "v9"}, "`revision` must be a branch, .* of tester/base, got 'v9'"),
        ("tester/base", {"local_files_only": True}, "must have been downloaded whole before"),
    ):
        with pytest.raises(ValueError, match=message):
            read_network_config(source, {"cache_dir": tmp_path, **arguments})
