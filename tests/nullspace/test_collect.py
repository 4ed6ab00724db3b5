from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusers_ext.nullspace import collect
from diffusers_ext.nullspace.collect import collect_statistics, text_only
from diffusers_ext.nullspace.prompts import preserved_texts
from diffusers_ext.nullspace.slots import find_linears
from diffusers_ext.nullspace.statistics import TEXT
from tests.tiny_digits import random_digits_pipeline
from tests.tiny_pipelines import pixart_pipeline, sdxl_pipeline

PROMPTS = ["a photo of the red digit seven", "a blue one", "a blue one"]
RUN = {"num_inference_steps": 2, "show_progress": False}


@pytest.fixture
def pipeline():
    return random_digits_pipeline()


def embed(pipeline, prompts: list[str]) -> torch.Tensor:
    """Text embeddings by the text encoders themselves, `(prompts, tokens, width)` float64."""
    parts = []
    for suffix in ("", "_2"):
        encoder = getattr(pipeline, f"text_encoder{suffix}", None)
        if encoder is None:
            continue
        tokenizer = getattr(pipeline, f"tokenizer{suffix}")
        ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
        sdxl = hasattr(pipeline, "text_encoder_2")
        parts.append(output.hidden_states[-2] if sdxl else output.last_hidden_state)
    return torch.cat(parts, dim=-1).double()


def dense_total(pipeline, prompts: list[str]) -> torch.Tensor:
    rows = embed(pipeline, prompts).flatten(0, 1)
    return rows.T @ rows


@pytest.mark.parametrize("build", [random_digits_pipeline, sdxl_pipeline])
@pytest.mark.parametrize("negative", ["", "a white nine"])
@pytest.mark.parametrize("expand", [True, False])
def test_keys_and_values_share_one_matrix_of_the_text_alone(build, negative, expand, monkeypatch):
    pipeline = build()
    expected = find_linears(pipeline.unet, ("k", "v"))
    monkeypatch.setattr(pipeline.unet, "forward", None)  # a denoiser call would fail
    statistics = collect_statistics(
        pipeline, PROMPTS, negative_prompt=negative, expand_sub_phrases=expand, show_progress=False
    )
    assert list(statistics.moments) == [TEXT]
    assert statistics.sources == dict.fromkeys(expected, TEXT)
    texts = preserved_texts(PROMPTS[:2]) if expand else PROMPTS[:2]
    guided = ["", negative] if negative else [""]
    total = dense_total(pipeline, texts) + 2 * dense_total(pipeline, guided)
    moment = statistics.moments[TEXT]
    assert moment.count == 16 * (len(texts) + 2 * len(guided))
    torch.testing.assert_close(moment.total, total, rtol=1e-12, atol=1e-10)
    assert statistics.facts["prompts"] == PROMPTS[:2]
    assert len(statistics.facts["models"]) == (2 if "XL" in type(pipeline).__name__ else 1)


def test_statistics_of_a_subject_leave_the_guidance_prompts_out(pipeline):
    statistics = collect_statistics(pipeline, PROMPTS[:1], expand_sub_phrases=False, include_guidance_prompts=False)
    total = dense_total(pipeline, PROMPTS[:1])
    torch.testing.assert_close(statistics.moments[TEXT].total, total, rtol=1e-12, atol=1e-10)
    with_guidance = collect_statistics(pipeline, PROMPTS[:1], expand_sub_phrases=False)
    with pytest.raises(ValueError, match="must be collected with the settings"):
        with_guidance.merge(statistics)


@pytest.mark.parametrize("parts", [2, 5])
def test_shards_of_the_text_sum_up_to_the_whole(pipeline, parts):
    whole = collect_statistics(pipeline, PROMPTS, batch_size=1)  # two batches of sub-phrases
    shards = [collect_statistics(pipeline, PROMPTS, batch_size=1, shard=(i, parts)) for i in range(parts)]
    merged = shards[0]
    for shard in shards[1:]:
        merged.merge(shard)
    assert merged.moments[TEXT].count == whole.moments[TEXT].count
    total = whole.moments[TEXT].total
    difference = (merged.moments[TEXT].total - total).abs().max() / total.abs().max()
    assert difference < 1e-14


def test_layers_choose_the_covered_linears(pipeline):
    statistics = collect_statistics(pipeline, PROMPTS, features="v", layers=(6, 0, 6))
    assert statistics.linears == list(find_linears(pipeline.unet, "v", [0, 6]))
    assert statistics.facts["settings"]["layers"] == [0, 6]


def test_the_pipeline_is_left_as_it_was(pipeline):
    pipeline.text_encoder.train()
    next(pipeline.text_encoder.children()).eval()
    models = (pipeline.text_encoder, pipeline.unet, pipeline.vae)
    modes = [module.training for model in models for module in model.modules()]
    before, state = dict(vars(pipeline)), torch.get_rng_state()
    modes_inside = set()
    watch = pipeline.text_encoder.register_forward_hook(
        lambda module, *_: modes_inside.update(part.training for part in module.modules())
    )
    collect_statistics(pipeline, PROMPTS)
    watch.remove()
    assert modes_inside == {False}
    broken = pipeline.text_encoder.register_forward_hook(raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        collect_statistics(pipeline, PROMPTS)
    broken.remove()
    assert vars(pipeline) == before
    assert torch.get_rng_state().equal(state)
    assert [module.training for model in models for module in model.modules()] == modes


def raise_interrupt(*_):
    raise KeyboardInterrupt


def test_keys_of_transformed_text_are_read_along_trajectories(pipeline):
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(
        pipeline.unet.config, encoder_hid_dim=128, encoder_hid_dim_type="text_proj"
    )
    assert text_only(pipeline.unet, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    pipeline.unet = unet.eval()
    statistics = collect_statistics(pipeline, PROMPTS[:2], layers=[2], **RUN)
    (key,) = statistics.moments
    assert key.endswith("attn2.kv")
    assert set(statistics.sources.values()) == {key}
    assert set(statistics.facts["models"]) == {"text_encoder", "denoiser"}
    with torch.no_grad():
        rows = unet.encoder_hid_proj(embed(pipeline, [*PROMPTS[:2], ""]).float()).double()
        # Two steps, and the empty prompt as the negative one of each of three prompts.
        weights = torch.tensor([2.0, 2, 2 + 6]).sqrt()[:, None, None]
        rows = (rows * weights).flatten(0, 1)
    total = statistics.moments[key].total
    torch.testing.assert_close(total, rows.T @ rows, rtol=1e-5, atol=1e-5 * total.max().item())
    assert statistics.moments[key].count == 16 * 12


def test_keys_of_transformers_are_read_along_trajectories():
    pipeline = pixart_pipeline()
    statistics = collect_statistics(pipeline, PROMPTS[1:2], features=("k", "q"), **RUN)
    assert len(statistics.moments) == 4
    name = "transformer_blocks.1.attn2"
    assert statistics.key(f"{name}.to_k") == f"{name}.kv"
    assert statistics.moments[f"{name}.kv"].dim == 16
    assert set(statistics.facts["models"]) == {"text_encoder", "denoiser"}
    statistics.validate()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "`prompts` must be a non-empty list of strings, got none"),
        ({"prompts": "a red seven"}, "`prompts` must be a list of prompts, got the string"),
        ({"features": ("k", "keys")}, r"`features` must be among .*, got \['keys'\]"),
        ({"layers": [0, 7]}, r"`layers` must be 'all' or indices from 0 to 6, got \[0, 7\]"),
        ({"prompts": ["red " * 15]}, r"must fit the tokenizer \(16 tokens\), got 17 tokens"),
        ({"negative_prompt": "red " * 15}, r"must fit the tokenizer \(16 tokens\), got 17 tokens"),
        ({"negative_prompt": None}, r"`negative_prompt` must be .* strings, got \[None\]"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1, got 0"),
        ({"shard": (2, 2)}, r"`shard` must be an index below a count, got \(2, 2\)"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(pipeline, monkeypatch, arguments, message):
    monkeypatch.setattr(pipeline.text_encoder, "forward", None)
    with pytest.raises(ValueError, match=message):
        collect_statistics(pipeline, **{"prompts": PROMPTS, "features": ("k", "q"), **arguments})


def test_fused_projections_are_refused(pipeline):
    pipeline.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"attn2.to_k` must not be fused .*unfuse_qkv"):
        collect_statistics(pipeline, PROMPTS)


def test_text_embeddings_that_are_not_finite_are_refused(pipeline):
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="`text embeddings` must be finite, got .* trace nan"):
        collect_statistics(pipeline, PROMPTS)


def test_text_is_encoded_in_large_batches(pipeline, monkeypatch):
    sizes = []
    encode = collect.encode_text
    monkeypatch.setattr(collect, "encode_text", lambda p, batch: sizes.append(len(batch)) or encode(p, batch))
    prompts = [f"{a} {b}" for a in "abcdefghi" for b in "xy"]
    collect_statistics(pipeline, prompts, batch_size=1, expand_sub_phrases=False)
    assert sizes == [16, 2, 1]  # 18 prompts, and the empty prompt
