from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from diffusers_ext.core.attention_processors import WrappingAttnProcessor, use_processors
from diffusers_ext.core.capture import capture
from tests.in_a_thread import in_a_thread
from tests.tiny_lora import add_random_lora
from tests.tiny_models import DENOISERS, flux, hunyuan_dit, sd_unet, wan


class Recorder(WrappingAttnProcessor):
    """Notes which layers are entered and left, and what they get."""

    def __init__(self, label: str = "", log: list | None = None):
        self.log = [] if log is None else log
        self.label, self.seen = label, {}

    @contextmanager
    def around(self, name, attn, hidden_states, encoder_hidden_states):
        self.seen[name] = (hidden_states, encoder_hidden_states)
        self.log.append((self.label + "enter", name))
        yield
        self.log.append((self.label + "leave", name))


def layer_names(model: torch.nn.Module) -> list[str]:
    return [key.removesuffix(".processor") for key in model.attn_processors]


def same_processors(model: torch.nn.Module, originals: dict) -> bool:
    now = model.attn_processors
    return list(now) == list(originals) and all(now[key] is originals[key] for key in now)


@torch.no_grad()
@pytest.mark.parametrize("builder", DENOISERS.values(), ids=DENOISERS)
def test_every_layer_is_wrapped_and_nothing_changes(builder):
    tiny, recorder = builder(), Recorder()
    before, originals = tiny.run(), tiny.model.attn_processors
    keys = list(tiny.model.state_dict())
    with use_processors(tiny.model, recorder) as names:
        during = tiny.run()
        assert list(tiny.model.state_dict()) == keys
    assert torch.equal(during, before)
    assert torch.equal(tiny.run(), before)
    assert sorted(names) == sorted(layer_names(tiny.model))
    assert set(recorder.seen) == set(names)
    assert same_processors(tiny.model, originals)


@pytest.mark.parametrize("builder", DENOISERS.values(), ids=DENOISERS)
def test_signature_is_the_one_of_the_processor_in_place(builder):
    model = builder().model
    originals = model.attn_processors
    with use_processors(model, Recorder()):
        for key, wrapped in model.attn_processors.items():
            signature = inspect.signature(originals[key].__call__)
            assert inspect.signature(wrapped.__call__) == signature
            assert not isinstance(wrapped, torch.nn.Module)


@torch.no_grad()
def test_pattern_chooses_layers_and_text_is_passed_on():
    tiny, recorder = sd_unet(), Recorder()
    with use_processors(tiny.model, recorder, ["*attn2", "mid_block*"]) as names:
        tiny.run()
    assert len(names) == 5
    assert set(recorder.seen) == set(names)
    text = {name: encoder for name, (_, encoder) in recorder.seen.items() if encoder is not None}
    assert sorted(text) == sorted(name for name in names if name.endswith("attn2"))
    assert all(torch.equal(read, tiny.inputs["encoder_hidden_states"]) for read in text.values())


@torch.no_grad()
@pytest.mark.parametrize("builder", [sd_unet, flux])
def test_exception_inside_puts_the_processors_back(builder):
    tiny = builder()
    before, originals = tiny.run(), tiny.model.attn_processors

    def stop_inside():
        with use_processors(tiny.model, Recorder()):
            assert not same_processors(tiny.model, originals)
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        stop_inside()
    assert same_processors(tiny.model, originals)
    assert torch.equal(tiny.run(), before)


@torch.no_grad()
def test_nested_uses_enclose_each_other():
    tiny, log = hunyuan_dit(), []
    before, originals = tiny.run(), tiny.model.attn_processors
    with use_processors(tiny.model, Recorder("inner ", log), "*0.attn2") as names:
        outside = tiny.model.attn_processors
        with use_processors(tiny.model, Recorder("outer ", log), "*0.attn2"):
            assert torch.equal(tiny.run(), before)
        assert same_processors(tiny.model, outside)
    assert [event for event, _ in log] == ["outer enter", "inner enter", "inner leave", "outer leave"]
    assert {name for _, name in log} == set(names)
    assert same_processors(tiny.model, originals)


def test_processors_replaced_inside_are_put_back():
    model = sd_unet().model
    originals = model.attn_processors
    with use_processors(model, Recorder(), "*attn2"):
        model.set_attn_processor(AttnProcessor())
    assert same_processors(model, originals)


def test_module_processors_come_back_with_their_weights():
    class ScaledProcessor(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner = torch.nn.Parameter(torch.tensor(0.5)), AttnProcessor2_0()

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return self.scale * self.inner(attn, hidden_states, encoder_hidden_states)

    tiny = sd_unet()
    tiny.model.set_attn_processor({key: ScaledProcessor() for key in tiny.model.attn_processors})
    before, keys = tiny.run(), list(tiny.model.state_dict())
    originals = tiny.model.attn_processors
    with use_processors(tiny.model, Recorder()):
        assert torch.equal(tiny.run(), before)
    assert same_processors(tiny.model, originals)
    assert list(tiny.model.state_dict()) == keys
    assert sum("processor.scale" in key for key in keys) == 8


def test_text_is_found_where_the_processor_takes_it():
    class MaskFirst:
        def __call__(self, attn, hidden_states, attention_mask=None, encoder_hidden_states=None):
            return hidden_states

    class Opaque:
        def __call__(self, *args, **kwargs):
            return args[1]

    model, recorder = sd_unet().model, Recorder()
    attn = model.mid_block.attentions[0].transformer_blocks[0].attn2
    image, mask, text = torch.randn(1, 2, 32), torch.ones(1), torch.randn(1, 3, 32)
    for processor, args in ((MaskFirst(), (mask, text)), (MaskFirst(), (mask,)), (Opaque(), ())):
        attn.set_processor(processor)
        with use_processors(model, recorder, "mid_block*attn2") as (name,):
            given = {} if args else {"encoder_hidden_states": text}
            assert attn.processor(attn, image, *args, **given) is image
        expected = None if args == (mask,) else text
        assert recorder.seen[name][1] is expected


def test_backend_settings_reach_the_processor_in_place():
    model = wan().model
    original = model.blocks[0].attn1.processor
    with use_processors(model, Recorder(), "blocks.0.attn1"):
        wrapped = model.blocks[0].attn1.processor
        assert wrapped._attention_backend is None
        model.blocks[0].attn1.set_attention_backend("native")
        wrapped._parallel_config = "config"
        assert wrapped._attention_backend == original._attention_backend == "native"
    assert original._parallel_config == "config"
    model = sd_unet().model
    with use_processors(model, Recorder()):
        assert not any(hasattr(p, "_attention_backend") for p in model.attn_processors.values())


def test_gradient_checkpointing_keeps_gradients():
    def gradients(*prototypes: Recorder) -> list[torch.Tensor]:
        tiny = sd_unet()
        tiny.model.train()
        tiny.model.enable_gradient_checkpointing()
        with ExitStack() as uses:
            for prototype in prototypes:
                uses.enter_context(use_processors(tiny.model, prototype))
            tiny.run().sum().backward()
        return [parameter.grad for parameter in tiny.model.parameters()]

    recorder = Recorder()
    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(recorder)))
    assert len(recorder.log) == 2 * 2 * len(recorder.seen)


@torch.no_grad()
def test_works_beside_a_lora_and_hooks():
    tiny = sd_unet()
    add_random_lora(tiny.model)
    before, read = tiny.run(), []
    with (
        use_processors(tiny.model, Recorder()),
        capture(tiny.model, "*to_k", lambda *features: read.append(features)) as names,
    ):
        assert torch.equal(tiny.run(), before)
    assert len(read) == len(names) == 8


@pytest.mark.parametrize("builder", DENOISERS.values(), ids=DENOISERS)
def test_fused_projections_are_refused(builder):
    model = builder().model
    model.fuse_qkv_projections()
    originals = model.attn_processors
    with (
        pytest.raises(ValueError, match=r"must not have fused .* `unfuse_qkv_projections\(\)`"),
        use_processors(model, Recorder()),
    ):
        pass
    assert same_processors(model, originals)


def test_wrong_arguments_are_errors():
    model = sd_unet().model
    originals = model.attn_processors
    with pytest.raises(ValueError, match="attention layers of UNet2D.*got 'conv_in'.*matches none"):
        use_processors(model, Recorder(), ["*attn2", "conv_in"]).__enter__()
    with pytest.raises(TypeError, match="`model` must be a diffusers model .* got Linear"):
        use_processors(torch.nn.Linear(2, 2), Recorder()).__enter__()
    with pytest.raises(TypeError, match="must be a WrappingAttnProcessor, got AttnProcessor2_0"):
        use_processors(model, AttnProcessor2_0()).__enter__()
    assert same_processors(model, originals)


@torch.no_grad()
def test_prototype_is_no_processor_by_itself():
    tiny = sd_unet()
    tiny.model.set_attn_processor(Recorder())
    with pytest.raises(TypeError, match="Recorder must be installed by `use_processors`"):
        tiny.run()
    tiny = sd_unet()
    with (
        pytest.raises(TypeError, match="WrappingAttnProcessor must define `around`"),
        use_processors(tiny.model, WrappingAttnProcessor()),
    ):
        tiny.run()


@torch.no_grad()
@pytest.mark.parametrize("last", ["first", "second"])
def test_uses_of_two_threads_overlap(last):
    tiny = sd_unet()
    originals = tiny.model.attn_processors
    recorders = {"first": Recorder(), "second": Recorder()}
    uses = {
        name: use_processors(tiny.model, recorders[name], targets)
        for name, targets in (("first", "*attn2"), ("second", ["*attn2", "mid_block*"]))
    }
    for use in uses.values():
        use.__enter__()
    in_a_thread(torch.no_grad()(tiny.run))
    assert not any(recorder.seen for recorder in recorders.values())
    (other,) = uses.keys() - {last}
    uses[other].__exit__(None, None, None)
    tiny.run()
    assert not recorders[other].seen
    assert recorders[last].seen
    uses[last].__exit__(None, None, None)
    assert same_processors(tiny.model, originals)
