"""What somebody loads who has diffusers and PEFT, but not this package; run as a script."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from diffusers import AutoModel, CogVideoXTransformer3DModel, DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub import hf_hub_download
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file


# As in `tests/hub/digests.py`, which cannot be imported here.
def digest(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def picture(pipeline: StableDiffusionPipeline) -> str:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        "a red seven", num_inference_steps=2, generator=generator, output_type="pt",
        height=32, width=32,
    ).images  # fmt: skip
    return digest({"picture": images})


def error_of(load: Callable[..., Any], *arguments: Any) -> str:
    try:
        return f"loaded a {type(load(*arguments)).__name__}"
    except (AttributeError, KeyError, ValueError) as error:  # diffusers 0.41 has an AttributeError
        return f"{type(error).__name__}: {error}"


def lora() -> dict[str, Any]:
    pipeline = StableDiffusionPipeline.from_pretrained("tester/base")
    plain = picture(pipeline)
    pipeline.load_lora_weights("tester/lora")
    file = load_file(hf_hub_download("tester/lora", "pytorch_lora_weights.safetensors"))
    loaded = get_peft_model_state_dict(pipeline.unet, adapter_name="default_0")
    return {
        "digest": f"{digest(loaded)} {picture(pipeline)}",
        "same keys": set(file) == {f"unet.{key}" for key in loaded},
        "plain picture": plain,
    }


def data_set() -> dict[str, Any]:
    rows = {name: load_dataset("tester/pairs", name, split="train") for name in ("pairs", "rejected")}
    return {name: [row.column_names, list(row["prompt"])] for name, row in rows.items()}


def card_without(name: str, repo_type: str = "model") -> list[str]:
    """Run the block of a card that is for those without the package; names what it made."""
    text = Path(hf_hub_download(f"tester/{name}", "README.md", repo_type=repo_type)).read_text()
    block = re.search(r"Without `diffusers_ext`.*?```python\n(.*?)```", text, re.DOTALL)[1]
    made = {}
    block = re.sub(r"(?m)^(image = .*)(\)\.images\[0\])$", r"\1, num_inference_steps=2\2", block)
    exec(block.replace('"cuda"', '"cpu"'), made)
    kept = ("pipeline", "moments", "golden")
    return [f"{key}: {type(made[key]).__name__}" for key in kept if key in made]


transformer = CogVideoXTransformer3DModel.from_pretrained("tester/video", subfolder="transformer")
pipelines, networks = ("golden", "null"), ("model", "npnet", "transformer", "rnn")
found = {
    "lora": lora(),
    "data set": data_set(),
    "cards": {name: card_without(name) for name in (*pipelines, "lora-below", "statistics-below")},
    "card of pairs": card_without("pairs-below", "dataset"),
    "eraser": error_of(PeftModel.from_pretrained, transformer, "tester/eraser"),
}
for cls in (StableDiffusionPipeline, DiffusionPipeline):
    found[cls.__name__] = {n: error_of(cls.from_pretrained, f"tester/{n}") for n in pipelines}
found["networks"] = {n: error_of(AutoModel.from_pretrained, f"tester/{n}") for n in networks}
print(json.dumps(found))
