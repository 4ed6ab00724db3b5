import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_ext.golden_noise.networks.files import convert_npnet
from diffusers_ext.golden_noise.networks.npnet import (
    NPNet,
    apply_in_windows,
    blending_weights,
    continue_noise,
    text_windows,
    window_starts,
)
from diffusers_ext.golden_noise.noise_statistics import noise_statistics
from tests.golden_noise.npnet_fixture import (
    SMALL_CONFIG,
    TEXT_WIDTH,
    inputs,
    official_weights,
    outputs,
    small_inputs,
    small_npnet,
)

OPTIONS = ("svd_dropout", "nt_adapter", "nt_finetune", "nt_dropout", "cross_attention")


@pytest.fixture(scope="module", params=["sdxl", "dit"])
def official(request):
    network = NPNet(text_embed_dim=TEXT_WIDTH[request.param]).eval()
    weights = convert_npnet(official_weights(request.param), network.state_dict())
    network.load_state_dict(weights)
    return network, *inputs(request.param), outputs(request.param)


def test_the_defaults_are_the_official_sdxl_network():
    with torch.device("meta"):
        parameters = sum(p.numel() for p in NPNet().parameters())
    assert parameters == 30_470_427 - 769_000 - 512  # without what has no effect


@pytest.mark.parametrize("gradients", [False, True])
def test_outputs_are_the_official_ones(official, gradients):
    network, noise, text, expected = official
    with torch.set_grad_enabled(gradients):
        scaled = network.text_norm(noise, text.flatten(1))
        features = network.noise_transformer(noise + scaled)
        golden = network(noise, text)
        rebuilt = network.svd_branch(noise)
    for found, name, tolerance in (
        (golden, "golden_noise", 1e-3),
        (rebuilt[0], "svd_branch_item0", 1e-3),
        (scaled[0], "text_emb_item0", 5e-5),
        (features[0], "golden_embedding_item0", 2e-5),
    ):
        torch.testing.assert_close(found, expected[name], rtol=0, atol=tolerance)


def test_signs_of_the_backend_are_an_option():
    network = NPNet(text_embed_dim=1024, svd_signs="backend").eval()
    network.load_state_dict(convert_npnet(official_weights("dit"), network.state_dict()))
    noise, text = inputs("dit")
    with torch.no_grad():
        golden = network(noise, text)
    torch.testing.assert_close(golden, outputs("dit")["golden_noise"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("options", [{}, dict.fromkeys(OPTIONS, True), {"svd_signs": "backend"}])
def test_a_saved_network_comes_back_to_the_bit(options, tmp_path):
    network = small_npnet(**options)
    noise, text = small_inputs()
    network.save_pretrained(tmp_path)
    loaded = NPNet.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in options} == options
    assert loaded.config.swin_depths == [2, 2]
    assert torch.equal(loaded(noise, text), network(noise, text))
    assert torch.equal(loaded.refine(noise, text), network.refine(noise, text))
    trained = {name: p.requires_grad for name, p in network.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == trained


@pytest.mark.parametrize("options", [{}, {name: True for name in OPTIONS if name != "nt_finetune"}])
def test_all_parts_get_gradients_in_training(options):
    network = small_npnet(**options).train()
    noise, text = small_inputs()
    network(noise, text).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # A bias common to all keys cancels in the softmax.
        if not name.endswith(("k_proj.bias",)):
            assert parameter.grad.abs().max() > 0, name


def test_a_small_network_learns():
    torch.manual_seed(0)
    network = NPNet(**SMALL_CONFIG).train()
    noise, text = small_inputs(batch=4)
    target = 1.3 * noise
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = (network(noise, text) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_what_was_planned_or_drawn_before_is_not_trained_on():
    """Indices are made in each call: those of a plan have no values, those of inference mode no gradient."""
    transformer = small_npnet().noise_transformer
    noise, _ = small_inputs()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        transformer(noise)
    with torch.inference_mode():
        expected = transformer(noise).clone()
    found = transformer(noise)
    torch.testing.assert_close(found, expected)
    found.sum().backward()


def test_dropout_acts_in_training_only():
    network = small_npnet(svd_dropout=True, nt_dropout=True)
    noise, text = small_inputs()
    assert torch.equal(network(noise, text), network(noise, text))
    network.train()
    assert not torch.equal(network.svd_branch(noise), network.svd_branch(noise))
    assert not torch.equal(network(noise, text), network(noise, text))
    before = network.refine(noise, text)
    assert torch.equal(before, network.refine(noise, text))
    assert network.training


def test_finetuning_trains_the_last_two_stages_only():
    network = small_npnet(nt_finetune=True, swin_depths=(1, 1, 1), swin_num_heads=(2, 2, 4), swin_image_size=32)
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(".swin.embeddings." in name or ".layers.0." in name for name in frozen)
    network.train()(*small_inputs()).sum().backward()
    assert all((p.grad is None) == (name in frozen) for name, p in network.named_parameters())


@pytest.mark.parametrize("option", ["nt_adapter", "cross_attention"])
def test_added_parts_start_as_the_identity(option):
    torch.manual_seed(0)
    extended = NPNet(**SMALL_CONFIG, **{option: True}).eval()
    plain = NPNet(**SMALL_CONFIG).eval()
    extended.beta.data.fill_(0.5)
    own = plain.state_dict().keys()
    plain.load_state_dict({k: v for k, v in extended.state_dict().items() if k in own})
    assert len(extended.state_dict()) > len(own)
    assert torch.equal(extended(*small_inputs()), plain(*small_inputs()))


def test_more_channels():
    network = small_npnet(in_channels=16)
    text = small_inputs()[1]
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert network.refine(noise, text).shape == noise.shape


def test_refine_keeps_energy_and_takes_scale_zero():
    network, (noise, text) = small_npnet(), small_inputs()
    golden = network.refine(noise, text)
    assert not torch.equal(golden, noise)
    torch.testing.assert_close(golden.square().mean((1, 2, 3)), noise.square().mean((1, 2, 3)))
    assert torch.equal(network.refine(noise, text, scale=0.0), noise)


def test_half_precision_stays_near():
    network, (noise, text) = small_npnet(), small_inputs()
    expected = network.refine(noise, text)
    found = network.to(torch.bfloat16).refine(noise, text)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("size", [(8, 12), (13, 20), (12, 5), (4, 4)])
def test_noise_of_other_sizes_stays_white(size):
    network, (noise, text) = small_npnet(), small_inputs(batch=32, size=size)
    network.alpha.data.fill_(0.1)
    network.beta.data.fill_(0.05)
    golden = network.refine(noise, text)
    assert (golden - noise).square().mean().sqrt() > 0.1
    # The noise of so few samples is itself not white to this precision.
    before, after = noise_statistics(noise), noise_statistics(golden)
    assert (after.std - before.std).abs().mean() < 0.03
    assert (after.lag1_correlation - before.lag1_correlation).mean().abs() < 0.05


def test_windows_correlate_neighbours_no_more_than_one_window():
    network, text = small_npnet(), small_inputs(batch=32)[1]
    added = {}
    for size in (8, 20):
        noise = torch.randn(32, 4, size, size, generator=torch.Generator().manual_seed(1))
        golden = network.refine(noise, text)
        difference = noise_statistics(golden).lag1_correlation
        added[size] = (difference - noise_statistics(noise).lag1_correlation).mean()
    assert added[20] < added[8] + 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 5}, r"`in_channels` must be a square number, .* got 5"),
        ({"svd_signs": "random"}, r"`svd_signs` must be one of .* got 'random'"),
        ({"svd_num_heads": 3}, r"`svd_num_heads` must divide 16, .* got 3"),
        ({"swin_image_size": 28}, r"`swin_image_size` must be a multiple of .* 16, got 28"),
        ({"swin_num_heads": (2,)}, r"`swin_num_heads` must have one entry per stage .* got \(2,\)"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        NPNet(**{**SMALL_CONFIG, **change})


@pytest.mark.parametrize(
    ("noise_shape", "text_shape", "message"),
    [
        ((2, 16, 8, 8), (2, 16, 128), r"`noise` must .* 4.* got "),
        ((2, 4, 8, 8), (2, 16, 64), r"`prompt_embeds` must .* 128.* got "),
        ((2, 4, 8, 8), (2, 15, 128), r"must hold 16 tokens or more .* padded to 16 tokens"),
        ((2, 4, 8, 8), (1, 16, 128), r"`prompt_embeds` must be \(2, tokens, dim\)"),
    ],
)
def test_input_of_another_model_is_refused(noise_shape, text_shape, message):
    network = small_npnet()
    with pytest.raises(ValueError, match=message):
        network.refine(torch.randn(noise_shape), torch.randn(text_shape))


def test_forward_takes_its_own_size_only():
    noise, text = small_inputs(size=(16, 16))
    with pytest.raises(ValueError, match=r"`noise` must be 8 high and wide, got \(2, 4, 16, 16\)"):
        small_npnet()(noise, text)
    with pytest.raises(ValueError, match=r"must hold 16 tokens, got \(2, 17, 128\)"):
        small_npnet()(torch.randn(2, 4, 8, 8), torch.randn(2, 17, 128))


def test_npnet_takes_the_usual_sizes_of_sdxl():
    network = NPNet().eval()
    noise = torch.randn(1, 4, 152, 104, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        refined = network.refine(noise, prompt_embeds=torch.randn(1, 77, network.config.text_embed_dim))
    assert refined.shape == noise.shape
    assert refined.isfinite().all()


# 1152x896, 1344x768 and 512x512 pixels of a network for 1024x1024, at a quarter of its size.
@pytest.mark.parametrize("size", [(36, 28), (42, 24), (16, 16)])
def test_other_sizes_are_as_white_as_the_own_size(size):
    network = small_npnet(sample_size=32)
    text = small_inputs(batch=24)[1]
    off = {}
    for shape in ((32, 32), size):
        noise = torch.randn(24, 4, *shape, generator=torch.Generator().manual_seed(1))
        golden = network.refine(noise, text)
        assert (golden - noise).square().mean().sqrt() > 0.1
        before, after = noise_statistics(noise), noise_statistics(golden)
        assert abs(after.std.mean() - 1) < 0.01
        off[shape] = (after.lag1_correlation - before.lag1_correlation).mean().abs()
    assert off[size] < off[32, 32] + 0.02


@pytest.mark.parametrize("size", [(8, 8), (12, 5), (4, 4)])
def test_a_noise_is_refined_alike_in_any_batch(size):
    network, (noise, text) = small_npnet(), small_inputs(batch=3, size=size)
    together = network.refine(noise, text)
    torch.manual_seed(3)  # the global generator has no part in it
    for i in range(3):
        alone = network.refine(noise[i : i + 1], text[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-5)
    assert torch.equal(network.refine(noise, text), together)


def test_longer_texts_are_read_part_by_part():
    network, (noise, text) = small_npnet(), small_inputs()
    twice = torch.cat([text, text], 1)
    torch.testing.assert_close(network.refine(noise, twice), network.refine(noise, text))
    other = torch.cat([text, -text], 1)
    mean = (network(noise, text) + network(noise, -text)) / 2
    torch.testing.assert_close(network.golden_noise(noise, other), mean)


def test_windows_cover_all_and_overlap(subtests):
    for window in [1, 8, 128]:
        for surplus in [0, 1, 5, 24, 130]:
            with subtests.test(window=window, surplus=surplus):
                length = window + surplus
                starts = window_starts(length, window)
                assert starts[0] == 0
                assert starts[-1] == length - window
                most = max(1, window * 3 // 4)
                assert all(0 < b - a <= most for a, b in zip(starts, starts[1:]))


def test_one_window_is_the_function_itself():
    noise = torch.randn(1, 4, 8, 8)
    assert apply_in_windows(lambda x: x * 3, noise, 8).equal(noise * 3)


@pytest.mark.parametrize("size", [(8, 9), (20, 33)])
def test_changes_are_averaged_and_noise_is_not(size):
    noise = torch.randn(2, 4, *size)
    assert torch.equal(apply_in_windows(torch.clone, noise, 8), noise)
    torch.testing.assert_close(apply_in_windows(lambda x: 1.5 * x, noise, 8), 1.5 * noise)
    seen = []
    apply_in_windows(lambda x: seen.append(tuple(x.shape)) or x, noise, 8)
    assert set(seen) == {(2, 4, 8, 8)}


def test_weights_fall_to_the_borders():
    weights = blending_weights(8)
    assert weights.min() > 0
    assert weights.max() == 1
    assert torch.equal(weights, weights.flip(0))
    assert weights[0, 0] < weights[0, 4] < weights[3, 4]


@pytest.mark.parametrize("size", [(16, 7), (5, 6), (1, 40)])
def test_a_short_side_is_continued_and_cropped(size):
    noise, seen = torch.randn(2, 4, *size), []
    found = apply_in_windows(lambda x: seen.append(tuple(x.shape)) or 1.5 * x, noise, 8)
    torch.testing.assert_close(found, 1.5 * noise)
    assert set(seen) == {(2, 4, 8, 8)}


def test_continued_noise_is_white_and_holds_the_noise():
    noise = torch.randn(32, 4, 20, 40, generator=torch.Generator().manual_seed(0))
    continued = continue_noise(noise, 40, 41)
    assert torch.equal(continued[..., 10:30, 0:40], noise)
    around = noise_statistics(continued)
    assert abs(around.std.mean() - 1) < 0.01
    assert abs(around.lag1_correlation.mean()) < 0.01
    assert not torch.equal(continued[0, :, :10], continued[1, :, :10])


def test_the_continuation_is_of_the_sample_and_of_nothing_else():
    noise = torch.randn(3, 4, 6, 6)
    continued = continue_noise(noise, 8, 8)
    torch.manual_seed(1)
    assert torch.equal(continue_noise(noise[1:2], 8, 8), continued[1:2])
    corner = continued[1, :, 0]
    # A sampler's own scale and half precision leave the seed.
    assert torch.equal(continue_noise(14.6 * noise[1:2] / 14.6, 8, 8)[0, :, 0], corner)
    assert torch.equal(continue_noise(noise[1:2].bfloat16(), 8, 8)[0, :, 0], corner.bfloat16())


@pytest.mark.parametrize(("tokens", "starts"), [(7, [0]), (14, [0, 7]), (10, [0, 3]), (15, [0, 4, 8])])
def test_texts_are_cut_into_as_few_parts_as_possible(tokens, starts):
    text = torch.arange(tokens).expand(2, tokens)[..., None]
    parts = text_windows(text, 7)
    assert [part[0, 0].item() for part in parts] == starts
    assert all(part.shape == (2, 7, 1) for part in parts)
