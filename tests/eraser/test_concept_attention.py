from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

from diffusers_ext.eraser.concept_attention import (
    agreement_weights,
    attention_mass,
    concept_attention,
    head_correlations,
    standardize,
)
from tests.eraser.plain_attention import TEXT, VIDEO, plain_maps, rotary
from tests.in_a_thread import in_a_thread
from tests.tiny_cogvideox import TEXT_WIDTH, tiny_transformer


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_mass_is_the_sum_of_the_softmax_over_the_chosen_text_tokens(chunk_size):
    query, key = random(2, 2, 3, 15, 8)
    tokens = torch.zeros(2, 5, dtype=torch.bool)
    tokens[0, [1, 4]] = tokens[1] = True
    mass = attention_mass(query, key, tokens, chunk_size=chunk_size)
    weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)[:, :, 5:]
    assert mass.shape == (2, 3, 10)
    torch.testing.assert_close(mass[0], weights[0, ..., 1] + weights[0, ..., 4])
    torch.testing.assert_close(mass[1], weights[1, ..., :5].sum(-1))


def test_standardised_maps_have_mean_0_and_deviation_1_and_constant_ones_are_0():
    maps = standardize(torch.stack([5 + 3 * random(20), torch.full((20,), 0.25)]))
    torch.testing.assert_close(maps[0].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(maps[0].std(correction=0), torch.tensor(1.0))
    assert torch.equal(maps[1], torch.zeros(20))


def test_agreement_is_the_correlation_averaged_over_clips_without_negative_ones():
    maps, reference = random(2, 2, 3, 30), random(2, 30, seed=1)
    maps[:, 0, 0] = 2 * reference + 7
    maps[:, 1, 2] = -reference
    plain = torch.stack(
        [
            torch.stack([torch.corrcoef(torch.stack([h, r]))[0, 1] for h in m.flatten(0, 1)]).reshape(2, 3)
            for m, r in zip(maps, reference)
        ]
    ).mean(0)
    expected = plain.clamp(min=0)
    correlations = head_correlations(maps, reference)
    torch.testing.assert_close(correlations.mean(0), plain)
    weights = agreement_weights(correlations)
    torch.testing.assert_close(weights, expected / expected.sum())
    assert weights.argmax() == 0
    assert weights[1, 2] == 0


def test_bad_references_are_refused():
    maps = random(2, 1, 1, 5)
    with pytest.raises(ValueError, match=r"`reference` must be \(batch, video\) like `head_maps`"):
        head_correlations(maps, random(2, 6))
    with pytest.raises(ValueError, match="`correlations` must be above 0 for some head, got none"):
        agreement_weights(head_correlations(maps, -maps[:, 0, 0]))


def inputs(batch: int = 2, dtype: torch.dtype = torch.float64, **more) -> dict:
    random = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(batch, 2, 4, 3, 4, generator=random).to(dtype),
        "encoder_hidden_states": torch.randn(batch, TEXT, TEXT_WIDTH, generator=random).to(dtype),
        "timestep": torch.tensor([400] * batch),
        "image_rotary_emb": rotary(),
        **more,
    }


def token_mask(*rows: tuple[int, ...]) -> torch.Tensor:
    mask = torch.zeros(len(rows), TEXT, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        mask[row, list(tokens)] = True
    return mask


def model(dtype: torch.dtype = torch.float64, **overrides):
    """Sharp attention: without it every map is flat."""
    transformer = tiny_transformer(**overrides).to(dtype)
    for name, weight in transformer.named_parameters():
        if "norm_q.weight" in name or "norm_k.weight" in name:
            weight.data = 1 + torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            weight.data = weight.data.to(dtype)
    return transformer


def number_of_hooks(transformer) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in transformer.modules())


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 7, 1024])
def test_maps_are_those_of_the_whole_matrix(rotates, chunk_size):
    transformer = model(
        use_rotary_positional_embeddings=rotates, sample_height=3, sample_frames=5, max_text_seq_length=TEXT
    )
    arguments = inputs()
    if not rotates:
        arguments["image_rotary_emb"] = None
    mask = token_mask((1, 2), (4,))
    expected = plain_maps(transformer, arguments, mask).mean(dim=(0, 2))
    with torch.no_grad(), concept_attention(transformer, mask, chunk_size=chunk_size) as attention:
        transformer(**arguments)
    assert attention.maps.dtype == torch.float32
    torch.testing.assert_close(attention.maps.double(), expected, rtol=1e-6, atol=0)
    assert expected.std() > 0.01 * expected.mean()


def test_layers_are_chosen():
    transformer, arguments, mask = model(), inputs(), token_mask((1,), (2,))
    expected = plain_maps(transformer, arguments, mask)[1].mean(dim=1)
    with torch.no_grad(), concept_attention(transformer, mask, layers=[1]) as attention:
        transformer(**arguments)
    torch.testing.assert_close(attention.maps.double(), expected, rtol=1e-6, atol=0)


def test_heads_are_kept_apart_or_weighted():
    transformer, arguments, mask = model(), inputs(), token_mask((1,), ())
    expected = plain_maps(transformer, arguments, mask).transpose(0, 1)
    weights = torch.tensor([[0.2, 0.3], [0.5, 0.0]])
    with torch.no_grad(), concept_attention(transformer, mask, head_weights=weights, keep_heads=True) as attention:
        transformer(**arguments)
    torch.testing.assert_close(attention.head_maps.double(), expected, rtol=1e-6, atol=0)
    heads = expected[0] - expected[0].mean(-1, keepdim=True)
    heads = heads / heads.std(-1, correction=0, keepdim=True)
    weighted = (heads * weights[:, :, None]).sum((0, 1))
    torch.testing.assert_close(attention.maps[0].double(), weighted, rtol=1e-4, atol=1e-5)
    assert torch.equal(attention.maps[1], torch.zeros(VIDEO))


def test_fused_projections_give_the_same_maps():
    transformer, arguments, mask = model(), inputs(), token_mask((1,), (2, 3))
    expected = plain_maps(transformer, arguments, mask).mean(dim=(0, 2))
    transformer.fuse_qkv_projections()
    with torch.no_grad(), concept_attention(transformer, mask) as attention:
        transformer(**arguments)
    torch.testing.assert_close(attention.maps.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_close_maps(dtype):
    mask = token_mask((1,), (2, 3))
    expected = plain_maps(model(), inputs(), mask).mean(dim=(0, 2))
    transformer = model(dtype)
    with torch.no_grad(), concept_attention(transformer, mask) as attention:
        transformer(**inputs(dtype=dtype))
    torch.testing.assert_close(attention.maps.double(), expected, rtol=0.05, atol=0)


def test_rows_without_the_concept_are_zero_and_the_others_as_alone():
    transformer, arguments = model(), inputs()
    with torch.no_grad():
        with concept_attention(transformer, token_mask((), (2,))) as guided:
            transformer(**arguments)
        with concept_attention(transformer, token_mask((1,), (2,))) as both:
            transformer(**arguments)
    assert torch.equal(guided.maps[0], torch.zeros(VIDEO))
    torch.testing.assert_close(guided.maps[1], both.maps[1])


def test_maps_are_of_the_latest_forward():
    transformer, mask = model(), token_mask((1,), (2,))
    later = inputs() | {"timestep": torch.tensor([900, 900])}
    with torch.no_grad():
        with concept_attention(transformer, mask) as alone:
            transformer(**later)
        with concept_attention(transformer, mask) as attention:
            transformer(**inputs())
            before = attention.maps
            transformer(**later)
    assert torch.equal(attention.maps, alone.maps)
    assert not torch.equal(attention.maps, before)


def test_recomputation_by_gradient_checkpointing_adds_nothing():
    transformer, mask = model().train(), token_mask((1,), (2,))
    with concept_attention(transformer, mask) as plain:
        transformer(**inputs())
    transformer.enable_gradient_checkpointing()
    with concept_attention(transformer, mask) as attention:
        output = transformer(**inputs()).sample
        before = attention.maps
        output.square().mean().backward()
    assert not attention.maps.requires_grad
    assert torch.equal(attention.maps, before)
    assert torch.equal(attention.maps, plain.maps)


def test_the_model_computes_what_it_computes_without_and_keeps_the_users_processors():
    class UsersProcessor(CogVideoXAttnProcessor2_0):
        pass

    transformer = model(torch.float32)
    transformer.set_attn_processor(UsersProcessor())
    arguments, mask = inputs(dtype=torch.float32), token_mask((1,), (2,))
    processors = list(map(id, transformer.attn_processors.values()))
    with torch.no_grad():
        expected = transformer(**arguments).sample
        with concept_attention(transformer, mask):
            inside = transformer(**arguments).sample
            assert list(map(id, transformer.attn_processors.values())) == processors
    assert torch.equal(inside, expected)
    assert list(map(id, transformer.attn_processors.values())) == processors
    assert number_of_hooks(transformer) == 0


def test_hooks_are_gone_after_an_exception_and_only_they():
    transformer = model()
    handle = transformer.transformer_blocks[0].attn1.norm_q.register_forward_hook(lambda *_: None)
    with (
        pytest.raises(ValueError, match=r"`token_mask` must be \(batch, text tokens\) = \(2, 5\)"),
        concept_attention(transformer, token_mask((1,))),
    ):
        transformer(**inputs())
    assert number_of_hooks(transformer) == 1
    handle.remove()


def test_bad_input_is_refused():
    transformer = model()
    cases = [
        (transformer, token_mask((1,)).long(), {}, TypeError, "`token_mask` must be .* of bool"),
        (transformer, token_mask((1,))[0], {}, TypeError, "`token_mask` must be"),
        (transformer, token_mask((1,)), {"chunk_size": 0}, ValueError, "`chunk_size` must be at"),
        (transformer, token_mask((1,)), {"layers": [2]}, ValueError, "`layers` must be from 0 to"),
        (transformer, token_mask((1,)), {"layers": []}, ValueError, "`layers` must be from 0 to"),
        (
            transformer,
            token_mask((1,)),
            {"head_weights": torch.ones(1, 2)},
            ValueError,
            r"`head_weights` must be \(layers, heads\) = \(2, 2\)",
        ),
        (torch.nn.Linear(2, 2), token_mask((1,)), {}, ValueError, "must be a .*CogVideoXTransformer"),
    ]
    for module, mask, options, error, message in cases:
        with pytest.raises(error, match=message), concept_attention(module, mask, **options):
            pass
    assert number_of_hooks(transformer) == 0
    with (
        concept_attention(transformer, token_mask((1,))) as attention,
        pytest.raises(ValueError, match="`maps` must be read after a forward"),
    ):
        attention.maps  # noqa: B018
    with (
        concept_attention(transformer, token_mask((1,))) as attention,
        pytest.raises(ValueError, match="`head_maps` must be read after a forward with"),
    ):
        attention.head_maps  # noqa: B018


def test_an_attention_mask_is_refused():
    transformer = model()
    extra = {"attention_kwargs": {"attention_mask": torch.ones(2, 1, TEXT + VIDEO)}}
    with (
        pytest.raises(ValueError, match="`attention_mask` of `transformer_blocks.0.attn1` must be"),
        concept_attention(transformer, token_mask((1,), (2,))),
    ):
        transformer(**inputs(**extra))


def test_other_threads_are_not_read():
    transformer = model()

    def other_request():
        with torch.no_grad():
            transformer(**inputs(batch=1))

    with torch.no_grad(), concept_attention(transformer, token_mask((1,), (2,))) as attention:
        transformer(**inputs())
        maps = attention.maps
        in_a_thread(other_request)  # of another batch than the mask's
        assert torch.equal(attention.maps, maps)
