from __future__ import annotations

import pytest
import torch
from peft import LoHaConfig

from diffusers_ext.core.attention_processors import CaptureAttnProcessor, ProjectAttnProcessor, use_processors
from diffusers_ext.core.capture import capture, find_modules
from tests.core.test_capture import Store, hooks_of
from tests.tiny_lora import (
    ATTENTION_LINEARS,
    add_random_lora,
    every_projection,
    project_weights,
    projections_for,
    random_projection,
)
from tests.tiny_models import DENOISERS, flux, sd_unet, wan


@torch.no_grad()
@pytest.mark.parametrize("builder", DENOISERS.values(), ids=DENOISERS)
def test_capture_hands_over_text_or_image_features(builder):
    tiny, store = builder(), Store()
    before = tiny.run()
    with use_processors(tiny.model, CaptureAttnProcessor(store)) as names:
        assert torch.equal(tiny.run(), before)
    assert set(store) == set(names)
    assert all(len(calls) == 1 and calls[0].ndim in (3, 4) for calls in store.values())


@torch.no_grad()
def test_captured_features_are_those_of_the_layer():
    tiny, store, linears = sd_unet(), Store(), Store()
    with use_processors(tiny.model, CaptureAttnProcessor(store)), capture(tiny.model, "*attn*.to_k", linears):
        tiny.run()
    for name, features in store.items():
        assert torch.equal(features[0], linears[f"{name}.to_k"][0])


@torch.no_grad()
@pytest.mark.parametrize("builder", [sd_unet, flux, wan])
def test_projection_is_that_of_the_weights(builder):
    tiny = builder()
    add_random_lora(tiny.model)
    projections = every_projection(tiny.model)
    with_lora, outputs = tiny.run(), {}
    processor = ProjectAttnProcessor(projector=projections)
    with use_processors(tiny.model, processor):
        for strength in (0.0, 0.5, 1.0):
            processor.strength = strength
            outputs[strength] = tiny.run()
    assert torch.equal(outputs[0.0], with_lora)
    assert torch.equal(tiny.run(), with_lora)
    for strength in (0.5, 1.0):
        again = builder()
        add_random_lora(again.model)
        project_weights(again.model, projections, strength)
        torch.testing.assert_close(outputs[strength], again.run())
    change = [(outputs[strength] - with_lora).norm().item() for strength in (0.5, 1.0)]
    assert 1e-3 < change[0] < change[1]


@torch.no_grad()
def test_lora_has_no_effect_on_preserved_text():
    tiny = sd_unet()
    before = tiny.run()
    names = add_random_lora(tiny.model, ["attn2.to_k", "attn2.to_v"])
    text = tiny.inputs["encoder_hidden_states"].reshape(-1, 32)
    projection = random_projection(32, text)
    processor = ProjectAttnProcessor(projector=dict.fromkeys(names, projection))
    assert (tiny.run() - before).abs().max() > 1e-2
    with use_processors(tiny.model, processor, "*attn2"):
        torch.testing.assert_close(tiny.run(), before)


@torch.no_grad()
def test_only_covered_linears_are_projected():
    tiny = sd_unet()
    add_random_lora(tiny.model)
    with_lora = tiny.run()
    projections = projections_for(tiny.model, ["mid_block*attn2.to_v"])
    with use_processors(tiny.model, ProjectAttnProcessor(projector=projections)):
        during = tiny.run()
    assert not torch.equal(during, with_lora)
    project_weights(tiny.model, projections, strength=1.0)
    torch.testing.assert_close(during, tiny.run())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_all_loaded_adapters_are_projected_and_may_come_later():
    tiny = sd_unet()
    projections = every_projection(tiny.model)
    before = tiny.run()
    with use_processors(tiny.model, ProjectAttnProcessor(projector=projections)):
        assert torch.equal(tiny.run(), before)
        add_random_lora(tiny.model, adapter_name="first")
        add_random_lora(tiny.model, adapter_name="second", seed=3)
        tiny.model.set_adapters(["first", "second"])
        during = tiny.run()
        tiny.model.disable_adapters()
        assert torch.equal(tiny.run(), before)
        tiny.model.enable_adapters()
    project_weights(tiny.model, projections, strength=1.0)
    torch.testing.assert_close(during, tiny.run())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_projection_follows_the_dtype_of_the_model(dtype):
    tiny = sd_unet()
    add_random_lora(tiny.model)
    processor = ProjectAttnProcessor(projector=every_projection(tiny.model))
    with use_processors(tiny.model, processor):
        expected = tiny.run()
        tiny.model.to(dtype)
        tiny.inputs.update(
            sample=tiny.inputs["sample"].to(dtype),
            encoder_hidden_states=tiny.inputs["encoder_hidden_states"].to(dtype),
        )
        found = tiny.run()
    assert found.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    assert (found.float() - expected).norm() < tolerance * expected.norm()


def test_hooks_are_there_only_while_a_layer_runs():
    tiny = sd_unet()
    add_random_lora(tiny.model)
    hooks, inside = hooks_of(tiny.model), []

    def stop(name, features):
        inside.append(sum(pre for pre, _ in hooks_of(tiny.model).values()))
        raise KeyError("stop")

    processor = ProjectAttnProcessor(projector=every_projection(tiny.model))
    with use_processors(tiny.model, CaptureAttnProcessor(stop)), use_processors(tiny.model, processor):
        assert hooks_of(tiny.model) == hooks
        with pytest.raises(KeyError, match="stop"):
            tiny.run()
        assert hooks_of(tiny.model) == hooks
    assert inside == [len(ATTENTION_LINEARS)]
    assert hooks_of(tiny.model) == hooks


def test_gradients_are_those_of_projected_weights():
    def gradients(project: bool) -> list[torch.Tensor]:
        tiny = sd_unet()
        layers = add_random_lora(tiny.model, ["attn2.to_v"])
        tiny.model.enable_gradient_checkpointing()
        projections = projections_for(tiny.model, ["*attn2.to_v"])
        if not project:
            project_weights(tiny.model, projections, strength=1.0)
        with use_processors(tiny.model, ProjectAttnProcessor(float(project), projector=projections)):
            tiny.run().square().sum().backward()
        return [layer.lora_B["default"].weight.grad for layer in layers.values()]

    for projected, expected in zip(gradients(True), gradients(False)):
        assert expected.abs().max() > 0
        torch.testing.assert_close(projected, expected)


@torch.no_grad()
def test_fused_lora_is_refused_with_the_remedy():
    tiny = sd_unet()
    add_random_lora(tiny.model)
    tiny.model.fuse_lora()
    fused, hooks = tiny.run(), hooks_of(tiny.model)
    processor = ProjectAttnProcessor(projector=every_projection(tiny.model))
    with use_processors(tiny.model, processor):
        with pytest.raises(ValueError, match=r"\['default'\] fused into.*Call `unfuse_lora\(\)`"):
            tiny.run()
        processor.strength = 0
        assert torch.equal(tiny.run(), fused)
    assert hooks_of(tiny.model) == hooks


@torch.no_grad()
@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}])
def test_what_a_projection_cannot_reach_is_refused(config):
    tiny = sd_unet()
    add_random_lora(tiny.model, ["attn2.to_out.0"], **config)
    processor = ProjectAttnProcessor(projector=every_projection(tiny.model))
    with (
        use_processors(tiny.model, processor),
        pytest.raises(ValueError, match=r"`.*attn2.to_out.0` must carry plain LoRAs.*'default'"),
    ):
        tiny.run()


@torch.no_grad()
def test_other_adapters_are_refused():
    tiny = sd_unet()
    tiny.model.add_adapter(LoHaConfig(r=2, target_modules=["to_k"]))
    processor = ProjectAttnProcessor(projector=every_projection(tiny.model))
    with (
        use_processors(tiny.model, processor),
        pytest.raises(ValueError, match="must carry LoRAs to be projected, got a .*loha"),
    ):
        tiny.run()


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_strength_out_of_range_is_an_error(strength):
    projector = {"attn.to_k": torch.eye(2)}
    with pytest.raises(ValueError, match=r"`strength` must be in \[0, 1\], got"):
        ProjectAttnProcessor(strength, projector=projector)
    processor = ProjectAttnProcessor(projector=projector)
    with pytest.raises(ValueError, match=r"`strength` must be in \[0, 1\], got"):
        processor.strength = strength
    assert processor.strength == 1.0


def test_unfit_projectors_are_errors():
    model = sd_unet().model
    with pytest.raises(TypeError, match="`projector` must map names .* got a Tensor"):
        ProjectAttnProcessor(projector=torch.eye(2))
    with pytest.raises(ValueError, match=r"must be a square matrix, got shape \(2, 3\)"):
        ProjectAttnProcessor(projector={"attn.to_k": torch.ones(2, 3)})
    stranger = ProjectAttnProcessor(projector={"blocks.0.attn2.to_k": torch.eye(2)})
    with pytest.raises(ValueError, match="must cover a Linear .* it covers 'blocks.0.attn2.to_k'"):
        use_processors(model, stranger).__enter__()
    name = next(iter(find_modules(model, "*attn2.to_k")))
    narrow = ProjectAttnProcessor(projector={name: torch.eye(2)})
    with pytest.raises(ValueError, match=r"must have width 32, got shape \(2, 2\)"):
        use_processors(model, narrow).__enter__()
