import zipfile

import pytest
import torch
from safetensors.torch import save_file

from diffusers_ext.golden_noise.networks.files import convert_npnet, find_variant, read_checkpoint
from diffusers_ext.golden_noise.networks.npnet import NPNet
from tests.golden_noise.npnet_fixture import nested, official_weights, rules


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An official `.pth`, with the constants that old versions of timm saved."""
    weights = dict(official_weights("dit"))
    attention = "unet_embedding.swin.layers.0.blocks.1"
    weights[f"{attention}.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    weights[f"{attention}.attn_mask"] = torch.zeros(64, 49, 49)
    path = tmp_path_factory.mktemp("official") / "dit.pth"
    torch.save(nested(weights), path)
    return path


@pytest.fixture(scope="module")
def model_state():
    with torch.device("meta"):
        return NPNet(text_embed_dim=1024).state_dict()


@pytest.mark.parametrize("name", ["sdxl", "dit", "svd_sensitive"])
def test_the_rule_gives_the_weights_of_the_reference(name):
    weights = official_weights(name)
    for key, rule in rules(name).items():
        if "check" not in rule:
            continue
        check, flat = rule["check"], weights[key].flatten()
        assert flat[0].item() == pytest.approx(check["first"], abs=2e-6)
        assert flat[-1].item() == pytest.approx(check["last"], abs=2e-6)
        room = 1e-4 + 1e-7 * flat.numel()
        assert flat.double().sum().item() == pytest.approx(check["sum"], abs=room)


def test_official_and_flat_files_load_the_same(checkpoint, tmp_path):
    from_pickle = NPNet.from_single_file(checkpoint)
    ported = {name.replace("embeeding.", "text_embedding."): value for name, value in official_weights("dit").items()}
    save_file(ported, tmp_path / "port.safetensors")
    from_port = NPNet.from_single_file(tmp_path / "port.safetensors", variant="Hunyuan-DiT")
    assert from_pickle.config.text_embed_dim == 1024
    assert not from_pickle.training
    assert all(parameter.requires_grad for parameter in from_pickle.parameters())
    other = from_port.state_dict()
    for name, value in from_pickle.state_dict().items():
        assert torch.equal(value, other[name]), name
    qkv = official_weights("dit")["unet_embedding.swin.layers.2.blocks.5.attn.qkv.weight"]
    attention = from_pickle.noise_transformer.swin.encoder.layers[2].blocks[5].attention
    assert torch.equal(attention.k_proj.weight, qkv[384:768])


def test_a_dtype_is_given(checkpoint):
    assert NPNet.from_single_file(checkpoint, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_variant_is_in_the_weights(checkpoint):
    assert find_variant(official_weights("sdxl")) == ("SDXL", {"text_embed_dim": 2048})
    with pytest.raises(ValueError, match=r"variant 'SDXL', got 'Hunyuan-DiT'"):
        NPNet.from_single_file(checkpoint, variant="SDXL")
    weights = {"embeeding.linear.weight": torch.empty(8, 77 * 768, device="meta")}
    with pytest.raises(ValueError, match=r"`embeeding.linear.weight` must have one of .* got \(8"):
        find_variant(weights)
    with pytest.raises(ValueError, match=r"must be NPNet's, .* got unet\."):
        find_variant({"unet.a": torch.empty(1), "unet.b": torch.empty(1)})


def test_weights_of_another_variant_do_not_fit(model_state):
    with pytest.raises(ValueError, match=r"`embeeding.linear.weight` must be \(8, 78848\)"):
        convert_npnet(official_weights("sdxl"), model_state)


@pytest.mark.parametrize(
    "name", ["unet_svd.mlp1.0.bias", "unet_svd.bn.running_mean", "alpha", "unet_svd.attention.qkv.weight"]
)
def test_a_missing_key_is_an_error(name, model_state):
    weights = dict(official_weights("dit"))
    del weights[name]
    with pytest.raises(ValueError, match=rf"1 missing: {name}\."):
        convert_npnet(weights, model_state)


@pytest.mark.parametrize("name", ["gamma", "unet_svd.attention.qkv.bias", "unet_embedding.attn_mask"])
def test_a_surplus_key_is_an_error(name, model_state):
    weights = {**official_weights("dit"), name: torch.zeros(3)}
    with pytest.raises(ValueError, match=rf"1 surplus: {name}\."):
        convert_npnet(weights, model_state)


def test_many_names_are_cut(model_state):
    weights = {name: value for name, value in official_weights("dit").items() if "mlp" not in name}
    with pytest.raises(ValueError, match=r"got \d\d missing: (\S+, ){5}\.\.\.\.$"):
        convert_npnet(weights, model_state)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    weights = {"alpha": torch.zeros(1000)}
    if suffix == ".pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    for size in (path.stat().st_size // 2, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match="must be a whole"):
            read_checkpoint(path)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "code_was_run"

    class Code:
        def __reduce__(self):
            return (marker.touch, ())

    torch.save({"alpha": Code()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="must hold nothing but tensors"):
        read_checkpoint(tmp_path / "bad.pth")
    assert not marker.exists()


def test_other_content_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match="must be a file"):
        read_checkpoint(path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="must hold a dictionary of weights, got list"):
        read_checkpoint(path)
    torch.save({"unet_svd": {"epoch": 3}}, path)
    with pytest.raises(ValueError, match=r"`unet_svd.epoch` must be a tensor, got int"):
        read_checkpoint(path)
    path.write_text("a photo of a dog\n")
    with pytest.raises(ValueError, match="must hold nothing but tensors; it is damaged"):
        read_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no weights")
    with pytest.raises(ValueError, match="must be a whole"):
        read_checkpoint(path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_larger_truncated_pickle_is_refused_wherever_it_ends(kept, tmp_path):
    path = tmp_path / "larger.pth"
    torch.save({"a": torch.zeros(50_000)}, path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match="must be a whole"):
        read_checkpoint(path)
