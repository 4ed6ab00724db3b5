"""HPSv2's way to make a picture square: the whole of it, on a black ground."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from diffusers_ext.core.pictures import rgb_picture


# https://github.com/openai/CLIP, the statistics of its training pictures.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def letterbox(image: Image.Image, size: int = 224, *, antialias: bool = True) -> torch.Tensor:
    """Resize the longer side to `size`, pad the shorter with black on both ends, normalise.

    As https://github.com/tgxs002/HPSv2/tree/866735ecaae999fa714bd9edfa05aa2672669ee3 does it:
    bicubic on the float tensor, overshoots kept, the smaller half of the padding left and above.

    Args:
        image: of any mode; on white where it is transparent (the official code fails on an alpha channel).
        antialias: what torchvision does since 0.17; `False` as it did when HPSv2 was published.

    Returns:
        `(3, size, size)` float32, normalised as CLIP's pictures are.
    """
    # A copy, because PIL's own memory is read-only.
    pixels = torch.from_numpy(np.array(rgb_picture(image))).permute(2, 0, 1).float() / 255
    longer = max(pixels.shape[-2:])
    if longer != size:
        # Python's rounding (half to even), as the official code.
        height, width = (max(round(side * (size / longer)), 1) for side in pixels.shape[-2:])
        pixels = F.interpolate(
            pixels[None],
            size=(height, width),
            mode="bicubic",
            align_corners=False,
            antialias=antialias,
        )[0]
    below, right = size - pixels.shape[-2], size - pixels.shape[-1]
    pixels = F.pad(pixels, (right // 2, right - right // 2, below // 2, below - below // 2))
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std
