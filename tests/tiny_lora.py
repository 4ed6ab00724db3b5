"""Random PEFT LoRAs on tiny denoisers, and projections for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from diffusers_ext.core.capture import find_modules

ATTENTION_LINEARS = ("to_q", "to_k", "to_v", "to_out.0")


def add_random_lora(
    model: torch.nn.Module,
    target_modules: Sequence[str] = ATTENTION_LINEARS,
    adapter_name: str = "default",
    seed: int = 1,
    **config: Any,
) -> dict[str, LoraLayer]:
    """Add a rank-2 LoRA with random A and B; returns the LoRA layers by dotted name."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=list(target_modules), **config)
    model.add_adapter(lora, adapter_name=adapter_name)
    return {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}


def random_projection(dim: int, preserved: torch.Tensor) -> torch.Tensor:
    """The projection `(dim, dim)` onto what is orthogonal to the rows of `preserved`."""
    basis = torch.linalg.qr(preserved.double().T).Q
    return (torch.eye(dim, dtype=torch.float64) - basis @ basis.T).float()


def projections_for(model: torch.nn.Module, patterns: list[str]) -> dict[str, torch.Tensor]:
    """Projections away from three random vectors, one for every Linear that matches."""
    torch.manual_seed(2)
    return {
        name: random_projection(linear.in_features, torch.randn(3, linear.in_features))
        for name, linear in find_modules(model, patterns).items()
    }


def every_projection(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`projections_for` all Linears that `add_random_lora` adapts."""
    return projections_for(model, [f"*{path}" for path in ATTENTION_LINEARS])


def project_weights(model: torch.nn.Module, projections: dict[str, torch.Tensor], strength: float) -> None:
    """Write `A ((1 - s) I + s P)` into every LoRA: what a projection at run time amounts to."""
    for name, matrix in projections.items():
        for lora_A in model.get_submodule(name).lora_A.values():
            blend = (1 - strength) * torch.eye(len(matrix)) + strength * matrix
            lora_A.weight.data = lora_A.weight.data @ blend
