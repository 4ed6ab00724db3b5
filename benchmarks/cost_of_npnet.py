"""What `NPNet` takes in terms of the same network written the straightforward way, batch by batch.

python benchmarks/cost_of_npnet.py

The straightforward form below follows the published code's structure with its parameter names: a float32
decomposition, Swin with rolled maps and windows cut out and put back, `F.linear` everywhere. The published script runs
it with gradients on; both ways are measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.normalization import AdaGroupNorm
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.machine import table, write_results
from benchmarks.timing import Ratio, compare
from diffusers_ext.golden_noise.networks.files import convert_npnet
from diffusers_ext.golden_noise.networks.npnet import NPNet

WINDOW = 7
LIMIT = 0.5
TOLERANCE = 1e-3  # of the signs of singular vectors; 1e-4 without them


def windows_of(x: torch.Tensor) -> torch.Tensor:
    """`(batch, height, width, dim)` -> `(batch * windows, 49, dim)`."""
    batch, height, width, dim = x.shape
    x = x.view(batch, height // WINDOW, WINDOW, width // WINDOW, WINDOW, dim)
    return x.transpose(2, 3).reshape(-1, WINDOW * WINDOW, dim)


def map_of(windows: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of `windows_of`."""
    count = size // WINDOW
    x = windows.view(-1, count, count, WINDOW, WINDOW, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, size, size, windows.shape[-1])


class PlainAttention(nn.Module):
    """Attention with one projection for query, key and value; with a position bias in windows."""

    def __init__(self, dim: int, heads: int, bias: bool, windowed: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)
        if windowed:
            self.relative_position_bias_table = nn.Parameter(torch.zeros(169, heads))
            place = torch.cartesian_prod(torch.arange(WINDOW), torch.arange(WINDOW))
            offset = place[:, None] - place[None] + WINDOW - 1
            index = offset[..., 0] * (2 * WINDOW - 1) + offset[..., 1]
            self.register_buffer("index", index, persistent=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = None
        if hasattr(self, "index"):
            bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)[None]
            if mask is not None:
                bias = bias + mask.repeat(batch // len(mask), 1, 1)[:, None]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class PlainBlock(nn.Module):
    """A Swin block on a `(batch, size, size, dim)` map."""

    def __init__(self, dim: int, heads: int, size: int, shift: int) -> None:
        super().__init__()
        self.size, self.shift = size, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = PlainAttention(dim, heads, True, True)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        mask = None
        if shift:
            part = torch.bucketize(torch.arange(size), torch.tensor([size - 7, size - shift]) - 1)
            labels = (3 * part[:, None] + part)[None, :, :, None]
            labels = windows_of(labels)[..., 0]
            mask = (labels[:, None] != labels[:, :, None]).float() * -100
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        back = (self.shift, self.shift)
        y = self.norm1(x)
        if self.shift:
            y = y.roll((-self.shift, -self.shift), (1, 2))
        y = map_of(self.attn(windows_of(y), self.mask), self.size)
        x = x + (y.roll(back, (1, 2)) if self.shift else y)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class PlainStage(nn.Module):
    """Patch merging, if any, and blocks."""

    def __init__(self, dim: int, heads: int, size: int, depth: int, merge: bool) -> None:
        super().__init__()
        self.downsample = None
        if merge:
            parts = {"norm": nn.LayerNorm(2 * dim), "reduction": nn.Linear(2 * dim, dim, bias=False)}
            self.downsample = nn.ModuleDict(parts)
        shifts = [3 * (i % 2) if size > WINDOW else 0 for i in range(depth)]
        self.blocks = nn.Sequential(*(PlainBlock(dim, heads, size, s) for s in shifts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.downsample is not None:
            batch, size, _, dim = x.shape
            x = x.reshape(batch, size // 2, 2, size // 2, 2, dim).permute(0, 1, 3, 4, 2, 5)
            x = self.downsample["reduction"](self.downsample["norm"](x.flatten(3)))
        return self.blocks(x)


def plain_swin() -> nn.ModuleDict:
    """Swin-T, with the head that no one asks."""
    sizes = zip((96, 192, 384, 768), (3, 6, 12, 24), (56, 28, 14, 7), (2, 2, 6, 2))
    stages = [PlainStage(*size, merge=i > 0) for i, size in enumerate(sizes)]
    embed = {"proj": nn.Conv2d(3, 96, 4, 4), "norm": nn.LayerNorm(96)}
    return nn.ModuleDict(
        {
            "patch_embed": nn.ModuleDict(embed),
            "layers": nn.Sequential(*stages),
            "norm": nn.LayerNorm(768),
            "head": nn.ModuleDict({"fc": nn.Linear(768, 1000)}),
        }
    )


class PlainNPNet(nn.Module):
    """The published SDXL network under the published names."""

    def __init__(self) -> None:
        super().__init__()
        self.unet_embedding = nn.ModuleDict(
            {"upconv": nn.Conv2d(7, 4, 1), "downconv": nn.Conv2d(4, 3, 1), "swin": plain_swin()}
        )

        def mlp(*dims: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(dims[0], dims[1]), nn.ReLU(), nn.Linear(dims[1], dims[2]))

        self.unet_svd = nn.ModuleDict(
            {
                "mlp1": mlp(256, 64, 256),
                "mlp2": mlp(256, 64, 256),
                "mlp3": nn.Sequential(nn.Linear(256, 256)),
                "attention": PlainAttention(256, 8, False, False),
                "bn": nn.BatchNorm2d(256),
                "mlp4": mlp(256, 1024, 256),
            }
        )
        self.embeeding = AdaGroupNorm(77 * 2048, 4, 1, eps=1e-6)
        self.alpha = nn.Parameter(torch.tensor([0.3]))
        self.beta = nn.Parameter(torch.tensor([0.2]))

    def swin_branch(self, noise: torch.Tensor) -> torch.Tensor:
        """What the Swin makes of a noise."""
        parts = self.unet_embedding
        image = parts["downconv"](F.interpolate(noise, (224, 224)))
        x = parts["swin"]["patch_embed"]["proj"](image).permute(0, 2, 3, 1)
        x = parts["swin"]["layers"](parts["swin"]["patch_embed"]["norm"](x))
        return parts["upconv"](F.interpolate(parts["swin"]["norm"](x), (128, 128)))

    def svd_branch(self, noise: torch.Tensor) -> torch.Tensor:
        """The noise with changed singular values."""
        parts, batch = self.unet_svd, len(noise)
        matrix = noise.view(batch, 2, 2, 128, 128).transpose(2, 3).reshape(batch, 256, 256)
        u, s, vh = torch.linalg.svd(matrix)
        tokens = parts["mlp1"](u.mT) + parts["mlp2"](vh) + parts["mlp3"](s)[:, None]
        s = parts["mlp4"](parts["attention"](tokens).mean(1)) + s
        rebuilt = u @ torch.diag_embed(s) @ vh
        return rebuilt.view(batch, 2, 128, 2, 128).transpose(2, 3).reshape(noise.shape)

    def forward(self, noise: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        text = self.embeeding(noise, prompt_embeds.flatten(1))
        features = self.swin_branch(noise + text)
        return self.svd_branch(noise) + (2 * self.alpha.sigmoid() - 1) * text + self.beta * features


def cost(plain: PlainNPNet, network: NPNet, batch: int, gradients: bool, pairs: int) -> Ratio:
    """`network` against `plain`, after checking that both say the same."""
    noise, text = torch.randn(batch, 4, 128, 128), torch.randn(batch, 77, 2048) * 0.5

    def straightforward() -> torch.Tensor:
        with torch.set_grad_enabled(gradients):
            return plain(noise, text)

    def ours() -> torch.Tensor:
        with torch.no_grad():
            return network(noise, text)

    difference = (ours() - straightforward()).abs().max().item()
    if not difference < TOLERANCE:
        raise RuntimeError(f"the two networks differ by {difference:.1e}.")
    return compare(ours, straightforward, pairs)


def main(input_args: list[str] | None = None) -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args(input_args)
    torch.manual_seed(0)
    plain, network = PlainNPNet().eval(), NPNet().eval()
    network.load_state_dict(convert_npnet(plain.state_dict(), network.state_dict()))
    results, rows = [], []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for batch in args.batches:
            for gradients in (False, True):
                r = cost(plain, network, batch, gradients, args.pairs)
                case = {"threads": threads, "batch": batch, "plain_with_gradients": gradients}
                results.append({**case, **r._asdict(), "limit": LIMIT})
                times = [f"{1000 * t / batch:.0f}" for t in (r.first_seconds, r.second_seconds)]
                spread = [f"{r.median:.2f}", f"{r.lowest:.2f} to {r.highest:.2f}"]
                rows.append([*map(str, case.values()), *times, *spread])
    header = ["threads", "batch", "plain with gradients", "NPNet, ms a noise", "plain, ms a noise"]
    text = table([*header, "ratio of time", "range"], rows)
    write_results("cost_of_npnet", {"limit": LIMIT, "cases": results}, text)
    print(text)


if __name__ == "__main__":
    main()
