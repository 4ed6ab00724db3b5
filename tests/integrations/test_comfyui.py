"""The nodes of ComfyUI, without ComfyUI: over the objects that its public source hands to nodes.

What it passes and what its own nodes are called was read in its source (comfy_extras/nodes_custom_sampler.py,
comfy/model_patcher.py, comfy/sd.py, comfy_execution/validation.py, nodes.py, late 2026).
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from diffusers_ext import collect_statistics, debleed_lora, save_eraser
from diffusers_ext.families.lora_files import read_lora
from diffusers_ext.families.predictions import Level, predicted_x_0
from diffusers_ext.golden_noise.diversity import mean_prediction, spread_output, step_spread
from tests.docs.snippet_models import save_subject
from tests.golden_noise.golden_pipelines import NETWORKS
from tests.test_imports import MOST_BODY_LINES, MOST_LINES, body_lines, functions
from tests.tiny_cogvideox import tiny_transformer
from tests.tiny_current_pipelines import tiny_wan_pipeline
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_erasers import add_random_eraser, velocity

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
TEXT = 8
# Of ComfyUI's own nodes that the workflows use: inputs, and types of the outputs.
BUILT_IN = {
    "CheckpointLoaderSimple": ({"ckpt_name"}, ["MODEL", "CLIP", "VAE"]),
    "UNETLoader": ({"unet_name", "weight_dtype"}, ["MODEL"]),
    "CLIPLoader": ({"clip_name", "type"}, ["CLIP"]),
    "VAELoader": ({"vae_name"}, ["VAE"]),
    "CLIPTextEncode": ({"text", "clip"}, ["CONDITIONING"]),
    "EmptyLatentImage": ({"width", "height", "batch_size"}, ["LATENT"]),
    "EmptyHunyuanLatentVideo": ({"width", "height", "length", "batch_size"}, ["LATENT"]),
    "RandomNoise": ({"noise_seed"}, ["NOISE"]),
    "CFGGuider": ({"model", "positive", "negative", "cfg"}, ["GUIDER"]),
    "KSamplerSelect": ({"sampler_name"}, ["SAMPLER"]),
    "BasicScheduler": ({"model", "scheduler", "steps", "denoise"}, ["SIGMAS"]),
    "SamplerCustomAdvanced": ({"noise", "guider", "sampler", "sigmas", "latent_image"}, ["LATENT", "LATENT"]),
    "KSampler": (
        {
            *("model", "seed", "steps", "cfg", "sampler_name", "scheduler"),
            *("positive", "negative", "latent_image", "denoise"),
        },
        ["LATENT"],
    ),
    "VAEDecode": ({"samples", "vae"}, ["IMAGE"]),
    "SaveImage": ({"images", "filename_prefix"}, []),
}
LINKED = {
    **{
        name: name.upper() for name in ("model", "clip", "vae", "conditioning", "noise", "guider", "sampler", "sigmas")
    },
    **{"positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
    **{"samples": "LATENT", "images": "IMAGE"},
}


@pytest.fixture(scope="module")
def nodes():
    """The package as ComfyUI imports it: by its path, under a name of its own."""
    name = "custom_nodes_diffusers_ext"
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    for loaded in [key for key in sys.modules if key.startswith(name)]:
        del sys.modules[loaded]


class Patcher:
    """What the nodes ask of a MODEL: ComfyUI's ModelPatcher."""

    load_device = "cpu"

    def __init__(self, keys: list[str] = (), channels: int = 4) -> None:
        self.keys, self.channels, self.patches, self.model_options = list(keys), channels, {}, {}

    def get_model_object(self, name: str):
        if name == "model_sampling":
            return SimpleNamespace(calculate_input=lambda sigma, x: x / (sigma**2 + 1).sqrt())
        return SimpleNamespace(latent_channels=self.channels) if name == "latent_format" else None

    def set_model_unet_function_wrapper(self, wrapper) -> None:
        self.model_options["model_function_wrapper"] = wrapper

    def clone(self) -> Patcher:
        copy = Patcher(self.keys, self.channels)
        copy.model_options = dict(self.model_options)
        copy.patches = {key: list(value) for key, value in self.patches.items()}
        return copy

    def add_patches(self, patches: dict, strength: float) -> list[str]:
        for key, patch in patches.items():
            self.patches.setdefault(key, []).append((strength, patch))
        return list(patches)


@pytest.fixture
def comfy(monkeypatch):
    """ComfyUI's own loader of LoRAs, over the names that the `Patcher` knows."""

    def load_lora_for_models(model, clip, lora, strength_model, strength_clip):
        known = {key: tensor for key, tensor in lora.items() if key.rpartition(".lora_")[0] in model.keys}
        patched = model.clone()
        patched.add_patches(known, strength_model)
        return patched, clip

    package, module = ModuleType("comfy"), ModuleType("comfy.sd")
    module.load_lora_for_models = load_lora_for_models
    package.sd = module
    monkeypatch.setitem(sys.modules, "comfy", package)
    monkeypatch.setitem(sys.modules, "comfy.sd", module)


class SeedNoise:
    """As ComfyUI's RandomNoise gives it."""

    seed = 7

    def generate_noise(self, input_latent: dict) -> torch.Tensor:
        return torch.randn(input_latent["samples"].shape, generator=torch.Generator().manual_seed(self.seed))


def network(kind: str = "model", channels: int = 4) -> torch.nn.Module:
    """A small network that is far from the identity."""
    made, options = NETWORKS[kind]
    torch.manual_seed(0)
    found = made(in_channels=channels, sample_size=8, text_embed_dim=TEXT, **options).eval()
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return found


def prompt(rows: int = 1) -> list:
    generator = torch.Generator().manual_seed(3)
    pooled = torch.randn(rows, 6, generator=generator)
    return [[torch.randn(rows, 5, TEXT, generator=generator), {"pooled_output": pooled}]]


@pytest.mark.parametrize("kind", ["model", "transformer"])
def test_golden_noise_is_refined_for_the_prompt(nodes, tmp_path, kind):
    saved = network(kind)
    saved.save_pretrained(tmp_path / "network")
    node = nodes.NODE_CLASS_MAPPINGS["DiffusersExtGoldenNoise"]()
    given = Patcher()
    golden, model = node.refine(given, prompt(), SeedNoise(), str(tmp_path / "network"), 0.7)
    assert model is given
    latent = {"samples": torch.zeros(2, 4, 8, 12)}
    plain, found = SeedNoise().generate_noise(latent), golden.generate_noise(latent)
    ((embeds, further),) = prompt()
    expected = saved.refine(
        plain, embeds.expand(2, -1, -1), pooled_prompt_embeds=further["pooled_output"].expand(2, -1), scale=0.7
    )
    assert golden.seed == 7
    assert found.equal(expected)
    assert not found.allclose(plain, atol=0.1)


@pytest.mark.parametrize("first", [True, False])
def test_a_model_spreads_as_the_dial_of_pipelines(nodes, first):
    module = sys.modules["custom_nodes_diffusers_ext.golden_noise"]
    generator = torch.Generator().manual_seed(1)
    mix, x_t = torch.randn(64, 64, generator=generator) / 8, torch.randn(2, 4, 8, 8, generator=generator)
    level = Level(0.6, 0.8)
    sigma = torch.full((2,), level.sigma / level.signal)

    def noise_of(x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(2) @ mix).tanh().view_as(x)

    def apply_model(x, sigma, **c):  # as ComfyUI's, of a model of noise
        sigma = sigma.view(-1, 1, 1, 1)
        return x - sigma * noise_of(x / (sigma**2 + 1).sqrt())

    spread = module.spread_model(Patcher(), 0.8)
    wrapper = spread.model_options["model_function_wrapper"]
    highest = sigma.max() if first else 2 * sigma.max()
    call = {"input": x_t / level.signal, "timestep": sigma}
    call["c"] = {"transformer_options": {"sample_sigmas": torch.stack([highest, 0 * highest])}}
    found = wrapper(apply_model, call)

    def predict(x: torch.Tensor) -> torch.Tensor:
        return predicted_x_0(noise_of(x), x, level, "epsilon")

    size = step_spread(0.8, first)
    output = spread_output(noise_of(x_t), x_t, mean_prediction(predict, x_t), level, "epsilon", size)
    torch.testing.assert_close(found, predicted_x_0(output, x_t, level, "epsilon"), atol=1e-4, rtol=1e-4)
    assert not found.allclose(predict(x_t), atol=0.05)
    twice = module.spread_model(spread, 0.8).model_options["model_function_wrapper"]
    assert twice.wrapped is wrapper
    assert not twice(apply_model, call).allclose(found, atol=1e-2)


def test_strength_zero_is_the_noise_that_came_in(nodes):
    module = sys.modules["custom_nodes_diffusers_ext.golden_noise"]
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    golden = module.RefinedNoise(SeedNoise(), network(), prompt(), strength=0)
    assert golden.generate_noise(latent).equal(SeedNoise().generate_noise(latent))


def test_rows_repeat_and_frames_are_refined_alone(nodes):
    module = sys.modules["custom_nodes_diffusers_ext.golden_noise"]
    golden = module.RefinedNoise(SeedNoise(), network(), prompt(2))
    clips = golden.generate_noise({"samples": torch.zeros(3, 4, 2, 8, 8)})
    plain = SeedNoise().generate_noise({"samples": torch.zeros(3, 4, 2, 8, 8)})
    text = prompt(2)[0][0][[0, 1, 0]]
    for frame in range(2):
        torch.testing.assert_close(clips[:, :, frame], golden.network.refine(plain[:, :, frame], text))


def test_what_golden_noise_cannot_do_is_refused(nodes, tmp_path):
    node = nodes.NODE_CLASS_MAPPINGS["DiffusersExtGoldenNoise"]()
    network().save_pretrained(tmp_path / "network")
    name = str(tmp_path / "network")
    with pytest.raises(ValueError, match="`noise_model` must have `in_channels` 16"):
        node.refine(Patcher(channels=16), prompt(), SeedNoise(), name, 1.0)
    with pytest.raises(ValueError, match="`noise_model` must have `text_embed_dim` 6"):
        node.refine(Patcher(), [[torch.zeros(1, 5, 6), {}]], SeedNoise(), name, 1.0)
    with pytest.raises(ValueError, match="`conditioning` must hold one prompt, got 2"):
        node.refine(Patcher(), prompt() * 2, SeedNoise(), name, 1.0)
    with pytest.raises(ValueError, match=r"`diversity` must be finite and in \[0, 1\]"):
        node.refine(Patcher(), prompt(), SeedNoise(), name, 1.0, 1.5)
    golden, _ = node.refine(Patcher(), prompt(), SeedNoise(), name, 1.0)
    with pytest.raises(ValueError, match=r"`noise` must be \(batch, channels"):
        golden.generate_noise({"samples": torch.zeros(1, 4, 8)})


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """Folders of a LoRA and of statistics of a tiny Stable Diffusion."""
    folder, pipeline = tmp_path_factory.mktemp("subject"), random_digits_pipeline()
    save_subject(folder / "lora", pipeline)
    statistics = collect_statistics(pipeline, ["a red seven", "a blue one"], show_progress=False)
    statistics.save_pretrained(folder / "statistics")
    return str(folder / "lora"), statistics, str(folder / "statistics")


def test_the_dial_goes_from_the_lora_to_its_projection(nodes, subject):
    module = sys.modules["custom_nodes_diffusers_ext.debleed_lora"]
    lora, statistics, _ = subject
    whole, half, none = (module.dialled_lora(lora, statistics, dial) for dial in (1.0, 0.5, 0.0))
    exported = module.export_lora(read_lora(lora), "comfyui")
    projected = module.export_lora(debleed_lora(lora, statistics, damping=1e-3), "comfyui")
    assert none.keys() == whole.keys() == exported.keys()
    assert all(key.startswith("lora_unet_") for key in none)
    for key, tensor in none.items():
        assert tensor.equal(exported[key])
        torch.testing.assert_close(whole[key], projected[key])
        torch.testing.assert_close(half[key], ((tensor + whole[key]) / 2).to(tensor))
    assert any(not whole[key].allclose(none[key], atol=1e-3) for key in none)
    with pytest.raises(ValueError, match="`dial` must be in"):
        module.dialled_lora(lora, statistics, 1.5)


def test_a_lora_with_a_dial_patches_the_model(nodes, subject, comfy):
    lora, _, statistics = subject
    module = sys.modules["custom_nodes_diffusers_ext.debleed_lora"]
    names = {key.partition(".lora_")[0] for key in module.dialled_lora(lora, subject[1], 0.0)}
    node, model = nodes.NODE_CLASS_MAPPINGS["DiffusersExtDebleedLora"](), Patcher(sorted(names))
    (patched,) = node.load(model, lora, statistics, 0.8, 1.0, 1e-3, "error")
    assert not model.patches
    assert {strength for patches in patched.patches.values() for strength, _ in patches} == {0.8}
    with pytest.raises(ValueError, match="The LoRA must change the model"):
        node.load(Patcher(["another"]), lora, statistics, 0.8, 1.0, 1e-3, "error")


def test_an_eraser_goes_beside_a_transformer_of_diffusers(nodes, tmp_path):
    erased, plain = tiny_transformer(), tiny_transformer()
    expected = velocity(plain)
    add_random_eraser(erased, concept="dog")
    save_eraser(erased, tmp_path / "no-dog", base_model_name_or_path="THUDM/CogVideoX-2b")
    node = nodes.NODE_CLASS_MAPPINGS["DiffusersExtLoadEraser"]()
    wrapper = SimpleNamespace(model=SimpleNamespace(diffusion_model=plain))
    for scale, found in ((1.0, velocity(erased)), (0.0, expected), (1.0, velocity(erased))):
        (model,) = node.load(wrapper, str(tmp_path / "no-dog"), scale)
        assert model is wrapper
        torch.testing.assert_close(velocity(plain), found, rtol=0, atol=1e-5)


def test_linear_erasers_become_loras_and_others_are_refused(nodes, tmp_path, comfy):
    node = nodes.NODE_CLASS_MAPPINGS["DiffusersExtLoadEraser"]()
    for kind in ("linear", "gelu"):
        transformer = tiny_wan_pipeline().transformer
        add_random_eraser(transformer, concept="dog", kind=kind)
        save_eraser(transformer, tmp_path / kind, base_model_name_or_path="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    blocks = len(transformer.blocks)
    model = Patcher([f"diffusion_model.blocks.{index}.cross_attn.o" for index in range(blocks)])
    (patched,) = node.load(model, str(tmp_path / "linear"), 0.5)
    assert len(patched.patches) == 2 * blocks
    with pytest.raises(ValueError, match="must be of the kind 'linear' to be a LoRA"):
        node.load(model, str(tmp_path / "gelu"), 1.0)
    with pytest.raises(TypeError, match="`model` must be a MODEL, or a wrapper around diffusers"):
        node.load("a checkpoint", str(tmp_path / "linear"), 1.0)


def test_nodes_declare_what_comfyui_reads(nodes):
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for name, node in nodes.NODE_CLASS_MAPPINGS.items():
        inputs = node.INPUT_TYPES()
        function = getattr(node(), node.FUNCTION)
        taken = function.__func__.__code__.co_varnames[1 : function.__func__.__code__.co_argcount]
        assert set(taken) == {*inputs["required"], *inputs.get("optional", ())}, name
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
        assert node.CATEGORY
        assert node.DESCRIPTION


@pytest.mark.parametrize("path", sorted((FOLDER / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_workflows_resolve(nodes, path):
    graph, own = json.loads(path.read_text()), nodes.NODE_CLASS_MAPPINGS
    assert set(own) & {node["class_type"] for node in graph.values()}
    outputs = {name: types for name, (_, types) in BUILT_IN.items()}
    outputs |= {name: list(node.RETURN_TYPES) for name, node in own.items()}
    for node in graph.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind in own:
            declared = own[kind].INPUT_TYPES()
            required, optional = set(declared["required"]), set(declared.get("optional", ()))
            assert required <= set(inputs) <= required | optional
        else:
            assert set(inputs) == BUILT_IN[kind][0], kind
        for name, value in inputs.items():
            if isinstance(value, list):
                source, place = value
                given = outputs[graph[source]["class_type"]][place]
                assert given in (LINKED[name], "*"), (kind, name)
            else:
                assert name not in LINKED, (kind, name)


def test_the_package_is_one_that_the_manager_installs():
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert project["project"].keys() >= {"name", "version", "description", "license", "dependencies"}
    assert project["tool"]["comfy"]["DisplayName"]
    requirements = (FOLDER / "requirements.txt").read_text().split("\n")
    assert [line for line in requirements if line and line[0] != "#"] == project["project"]["dependencies"]


def test_the_source_keeps_the_rules_of_the_house():
    for path in FOLDER.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= MOST_LINES
        for name, function, public in functions(ast.parse(text)):
            assert body_lines(function) <= MOST_BODY_LINES, name
            assert not public or name.endswith("__init__") or ast.get_docstring(function), name
            assert function.returns is not None, name
