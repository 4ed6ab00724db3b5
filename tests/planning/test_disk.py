from __future__ import annotations

import io

import torch
from safetensors.torch import save

from diffusers_ext.planning.settings import PlannedRun
from diffusers_ext.planning.tracing import checkpoint_bytes, optimizer_bytes, safetensors_bytes


def test_safetensors_to_the_byte():
    tensors = {"b.weight": torch.zeros(3, 5), "a": torch.zeros(7, dtype=torch.float16)}
    assert safetensors_bytes(tensors) == len(save(tensors))
    metadata = {"note": "é and 'quotes'"}
    difference = safetensors_bytes(tensors, metadata) - len(save(tensors, metadata))
    assert abs(difference) <= 8
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    assert safetensors_bytes(meta) == safetensors_bytes(tensors)


def test_the_optimizers_file():
    weights = [torch.nn.Parameter(torch.randn(size, 100)) for size in (40, 9)]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    planned = optimizer_bytes(weight.to("meta") for weight in weights)
    assert abs(planned - buffer.getbuffer().nbytes) < 64 * 2 * len(weights)
    assert optimizer_bytes([]) == 0


def test_averaged_weights_are_in_a_checkpoint():
    weights = [torch.zeros(100, 100)]
    with_ema = checkpoint_bytes(weights, weights, ema=True)
    assert with_ema - checkpoint_bytes(weights, weights) == 4 * 100 * 100


def test_how_many_checkpoints_stay():
    def number(every, limit=None):
        run = PlannedRun(max_train_steps=100, checkpointing_steps=every, checkpoints_total_limit=limit)
        return run.num_checkpoints

    assert [number(None), number(30), number(10, 2)] == [0, 3, 2]
