"""Published figures of GPUs, and the time that operations take by them.

From NVIDIA's data sheets of T4, A10 and A10G, L4, L40S, A100, H100 and H200, and from its white papers on the
architectures Ampere GA102, Ada and RTX Blackwell: memory, bandwidth, and the dense rates of tensor cores with float32
sums; of float32 the rate without tensor cores. PyTorch uses TF32, at half the rate of float16, for convolutions alone
unless told otherwise. T4 has neither TF32 nor bfloat16, which it computes as float32.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

from diffusers_ext.core.settings import did_you_mean
from diffusers_ext.planning.tracing import Operation

# Of a GPU's published rates; what eager PyTorch reaches in models of this kind, by and large.
MATMUL_UTILIZATION, BANDWIDTH_UTILIZATION = 0.5, 0.75
LAUNCH_SECONDS = 5e-6
_WITHOUT_BFLOAT16 = "T4"


class Gpu(NamedTuple):
    """One GPU."""

    name: str
    memory_gib: float
    half_tflops: float  # float16; bfloat16 too, but for T4
    float32_tflops: float
    bandwidth: float  # 10^9 bytes a second

    def flops(self, dtype: torch.dtype, convolution: bool = False) -> float:
        """Operations a second at best in a dtype; double precision counts as float32."""
        if dtype == torch.float16 or (dtype == torch.bfloat16 and self.name != _WITHOUT_BFLOAT16):
            return 1e12 * self.half_tflops
        if convolution and self.name != _WITHOUT_BFLOAT16:
            return 1e12 * max(self.half_tflops / 2, self.float32_tflops)
        return 1e12 * self.float32_tflops


GPUS = (
    Gpu("RTX 3060", 12, 25.5, 12.7, 360),
    Gpu("RTX 3080", 10, 59.5, 29.8, 760),
    Gpu("RTX 3090", 24, 71.0, 35.6, 936),
    Gpu("RTX 4060 Ti 16GB", 16, 44.1, 22.1, 288),
    Gpu("RTX 4070", 12, 58.3, 29.1, 504),
    Gpu("RTX 4080", 16, 97.5, 48.7, 717),
    Gpu("RTX 4090", 24, 165.2, 82.6, 1008),
    Gpu("RTX 5080", 16, 112.6, 56.3, 960),
    Gpu("RTX 5090", 32, 209.5, 104.8, 1792),
    Gpu("T4", 16, 65.0, 8.1, 320),
    Gpu("A10G", 24, 70.0, 35.0, 600),
    Gpu("L4", 24, 121.0, 30.3, 300),
    Gpu("L40S", 48, 362.0, 91.6, 864),
    Gpu("A100 40GB", 40, 312.0, 19.5, 1555),
    Gpu("A100 80GB", 80, 312.0, 19.5, 2039),
    Gpu("H100", 80, 989.0, 67.0, 3350),
    Gpu("H200", 141, 989.0, 67.0, 4800),
)


def find_gpu(name: str) -> Gpu:
    """A GPU by its name, with or without spaces, maker and unit: `"4090"`, `"a100-80"`, `"L4"`.

    Raises `ValueError` where there is no such GPU, or more than one.
    """
    wanted = _key(name)
    exact = [gpu for gpu in GPUS if _key(gpu.name) == wanted]
    found = exact or [gpu for gpu in GPUS if wanted and _key(gpu.name).startswith(wanted)]
    if len(found) != 1:
        several = f", which are {[gpu.name for gpu in found]}" if found else ""
        raise ValueError(
            f"`gpu` must be 'here' or one of {[gpu.name for gpu in GPUS]}, got {name!r}{several}."
            f"{did_you_mean(name, [gpu.name for gpu in GPUS])} Give `memory_gib` for another card."
        )
    return found[0]


def _key(name: str) -> str:
    letters = "".join(letter for letter in name.lower() if letter.isalnum())
    for word in ("nvidia", "geforce", "rtx"):
        letters = letters.removeprefix(word)
    return letters.removesuffix("gb").removesuffix("g") if letters[:1] in "ah" else letters


def gpu_seconds(operations: Counter[Operation], gpu: Gpu) -> float:
    """Time of operations on a GPU: each takes what its arithmetic or its traffic takes, or a launch."""
    bandwidth = 1e9 * gpu.bandwidth * BANDWIDTH_UTILIZATION
    return sum(
        count
        * max(
            operation.flops / (gpu.flops(operation.dtype, operation.convolution) * MATMUL_UTILIZATION),
            operation.bytes / bandwidth,
            LAUNCH_SECONDS,
        )
        for operation, count in operations.items()
    )
