"""The eraser beside one attention: a bottleneck added to the video tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional

from diffusers_ext.core.restored_state import CallScope
from diffusers_ext.eraser.adapter.projections import EraserProjection, FusedErasers, can_be_fused, fuse
from diffusers_ext.eraser.adapter.thread_state import ThreadGate, ThreadRecord, ThreadScale

Recorder = Callable[[dict[str, torch.Tensor]], None]


def output_projection(attention: nn.Module) -> nn.Module:
    """The Linear `to_out.0` of an attention, also where LoRAs wrap it."""
    projection = attention.to_out[0]
    while hasattr(projection, "base_layer"):
        projection = projection.base_layer
    return projection


class EraserLayer(nn.Module, BaseTunerLayer):
    """Erasers after the output projection of one attention, in the place of its dropout.

    With tokens `[text; video]` (text first) and adapters `a` of scale `s_a`,

        text' = text,    video' = video + sum_a s_a * up_a(GELU(down_a(video))),

    as in T2VUnlearning (https://arxiv.org/abs/2505.17550) and, for images, Receler (https://arxiv.org/abs/2311.17717).
    `up` starts at zero, so a new eraser changes nothing. The weights are float32 and cast to the dtype of the tokens
    when used. GELU lies between the two projections, so such an eraser cannot be merged.

    One of the kind `"linear"` has neither GELU nor biases and reads what the output projection `to_out.0` reads,

        to_out.0(x)' = W x + b + s_a * up_a(down_a(x)),

    which is a LoRA on that projection, and can be exported and merged as one. Where one projection serves text and
    video (CogVideoX, Z-Image), it changes the text tokens too.

    In its place the layer does what the dropout does, its `base_layer`. It adds in a hook on the attention, whose
    output is `(video, text)`, or one stream of which `video_rows` tells the video's by the keywords of the call, or in
    its place where that gets video tokens alone (`video_alone`), and linear ones in a hook on the projection: nothing
    is noted between two calls, so that several threads may run one model with prompts of different lengths.
    Frozen erasers are computed as one, see `FusedErasers`.
    """

    adapter_layer_names = ("eraser_down", "eraser_up")
    other_param_names = ("r", "kinds", "scaling", "scale_tensors", "thread_scales", "unscaled")
    video_rows: Callable[[Mapping[str, Any]], torch.Tensor] | None = None  # of its family, see `Family.video_rows`

    def __init__(
        self, base_layer: nn.Module, in_features: int, video_alone: bool = False, inner_features: int | None = None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.video_alone = video_alone
        self.in_features = self.out_features = in_features
        self.inner_features = inner_features or in_features  # that the output projection reads
        self.eraser_down = nn.ModuleDict()
        self.eraser_up = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.kinds: dict[str, str] = {}
        self.scaling: dict[str, float] = {}
        # A compiled graph reads the scale from a tensor, which it does not specialise on.
        self.scale_tensors: dict[str, torch.Tensor] = {}
        self.thread_scales: dict[str, ThreadScale] = {}  # what a thread adds to it
        self.unscaled: dict[str, list[tuple[float, float]]] = {}
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        # diffusers' `set_lora_device` looks into every adapter layer for LoRAs; there is none here.
        self.lora_A: dict[str, nn.Module] = {}
        self.off: list[CallScope] = []
        self.scaled: list[tuple[CallScope, str, float]] = []  # what calls of a scope add to an eraser's scale
        self.gate = ThreadGate()
        self.recorders: list[Recorder] = []
        self._recorded = ThreadRecord()
        self._fused: dict[str, FusedErasers] = {}
        self._hooks: dict[str, Any] = {}
        self.train(base_layer.training)

    def update_layer(
        self, adapter_name: str, r: int, init_weights: bool, device: torch.device, kind: str = "gelu"
    ) -> None:
        """Add one eraser of width `r`: random `down`, and `up` zero unless `init_weights` is False."""
        inner = self.inner_features if kind == "linear" else self.in_features
        settings = {"bias": kind == "gelu", "device": "cpu", "dtype": torch.float32}
        down, up = EraserProjection(inner, r, **settings), EraserProjection(r, self.out_features, **settings)
        if init_weights:
            for parameter in up.parameters():
                nn.init.zeros_(parameter)
        for projection in (down, up):
            projection.train(self.training)
            if not projection.weight.is_meta:
                projection.to(device)
        self._fused = {}
        self.eraser_down[adapter_name], self.eraser_up[adapter_name] = down, up
        self.r[adapter_name] = r
        self.kinds[adapter_name] = kind
        self.scaling[adapter_name] = 1.0
        self.scale_tensors[adapter_name] = torch.ones((), device="cpu", dtype=torch.float32)
        self.thread_scales[adapter_name] = ThreadScale()
        self.unscaled[adapter_name] = []

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the dropout does; the erasers come after the attention but where `video_alone`, see `add_to_video`."""
        dropout = self._modules["base_layer"]
        # One call less a layer: in evaluation it passes on what it gets.
        if type(dropout) is not nn.Dropout or dropout.training or dropout._forward_hooks:
            hidden_states = dropout(hidden_states)
        return self.add_to_video(hidden_states) if self.video_alone else hidden_states

    def add_to_video(self, video: torch.Tensor, arguments: Mapping[str, Any] | None = None) -> torch.Tensor:
        """Tokens `(batch, video, dim)` with erasers of GELU; of a stream, for a call's `arguments`, video's alone."""
        if self._disable_adapters or self.bypassed:
            return video
        if not self.recorders:
            erased = self._add("gelu", video, video)
            if arguments is None or erased is video:
                return erased
            return torch.where(self.video_rows(arguments), erased, video)
        linear = {name: added[:, -video.shape[1] :] for name, added in self._recorded.take().items()}
        added = self._added("gelu", video)
        if arguments is not None and (linear or added):
            rows = self.video_rows(arguments)
            linear, added = ({n: torch.where(rows, x, 0.0) for n, x in kept.items()} for kept in (linear, added))
        for recorder in self.recorders if linear or added else ():
            recorder(linear | added)
        return sum(added.values(), start=video)

    def add_to_projection(self, projected: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """What the output projection made of its input, with linear erasers; the same shape and dtype."""
        if self._disable_adapters or self.bypassed:
            return projected
        if not self.recorders:
            return self._add("linear", projected, features)
        added = self._added("linear", features)
        self._recorded.put(added)
        return sum(added.values(), start=projected)

    def _add(self, kind: str, base: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            fused, scaling = self._fused.get(kind), self.call_scaling
            if fused is None or not fused.is_current(self._active_adapter, scaling, features):
                fused = self._fuse(kind, features, scaling)
            if fused is not None:
                return fused.add(base, features)
        return sum(self._added(kind, features).values(), start=base)

    def _fuse(self, kind: str, features: torch.Tensor, scaling: Mapping[str, float]) -> FusedErasers | None:
        """Also checks the scales: some are from `scale_layer`, and here diffusers takes them back after an error."""
        self._fused.pop(kind, None)
        names = self._active_erasers(kind)
        for name in names:
            check_scale(name, scaling[name])
        pairs = [(self.eraser_down[name], self.eraser_up[name]) for name in names]
        projections = [projection for pair in pairs for projection in pair]
        if not can_be_fused(projections):
            return None
        self._fused[kind] = fused = fuse(kind, pairs, names, self._active_adapter, scaling, features)
        return fused

    def _added(self, kind: str, features: torch.Tensor) -> dict[str, torch.Tensor]:
        names = self._active_erasers(kind)
        if not torch.compiler.is_compiling():
            scaling = self.call_scaling
            for name in names:
                check_scale(name, scaling[name])
        return {name: self.erase(name, features) for name in names}

    def _active_erasers(self, kind: str | None = None) -> list[str]:
        return [name for name in self.active_adapters if name in self.kinds and kind in (None, self.kinds[name])]

    @property
    def bypassed(self) -> bool:
        """Whether the calling thread or task has switched the erasers off by `switched_off`."""
        # A compiled graph multiplies by the gate instead.
        if torch.compiler.is_compiling() or not self.off:
            return False
        return any(scope.covers_this_call() for scope in tuple(self.off))

    @contextmanager
    def switched_off(self, scope: CallScope) -> Iterator[None]:
        """Add nothing in calls that `scope` covers, while the context is open."""
        self.off.append(scope)
        reopen = self.gate.close()
        try:
            yield
        finally:
            reopen()
            self.off.remove(scope)

    @property
    def call_scaling(self) -> Mapping[str, float]:
        """The erasers' scales in this call, with what the calling thread or task adds by `scaled_in`."""
        if not self.scaled:
            return self.scaling
        found = dict(self.scaling)
        for scope, name, scale in tuple(self.scaled):
            if name in found and scope.covers_this_call():
                found[name] += scale
        return found

    @contextmanager
    def scaled_in(self, scope: CallScope, adapter_name: str, scale: float) -> Iterator[None]:
        """Add `scale` to that of one eraser in calls that `scope` covers, while the context is open."""
        check_scale(adapter_name, scale)
        entry = (scope, adapter_name, scale)
        self.scaled.append(entry)
        take_back = self.thread_scales[adapter_name].add(scale)
        try:
            yield
        finally:
            take_back()
            self.scaled.remove(entry)

    def erase(self, adapter_name: str, features: torch.Tensor) -> torch.Tensor:
        """What one eraser adds, `scale * up(GELU(down(x)))` without GELU for linear ones, in the dtype of `x`.

        `x` are the video tokens `(batch, video, dim)`, or what the output projection reads for linear ones.
        """
        hidden = self.eraser_down[adapter_name](features)
        if self.kinds[adapter_name] == "gelu":
            hidden = functional.gelu(hidden)
        scale = self.scale_tensors[adapter_name]
        if torch.compiler.is_compiling():
            scale = (scale + self.thread_scales[adapter_name].added) * self.gate.openness
        elif self.scaled:
            scale = scale.new_tensor(self.call_scaling[adapter_name])
        output = self.eraser_up[adapter_name](hidden, scale)
        return output.to(features.dtype)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make `scale` the number that one eraser's output is multiplied by; others are ignored."""
        if adapter not in self.eraser_down:
            return
        check_scale(adapter, scale)
        scaled = self.unscaled[adapter]
        if scale == 1.0 and scaled and scaled[-1][0] == 0:
            # diffusers ends `attention_kwargs={"scale": 0}` by this call: nothing can be divided
            # by 0, but the scale from before is known here.
            scale = scaled.pop()[1]
        else:
            scaled.clear()
        self._write_scale(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active erasers, until `unscale_layer` is called."""
        for name in self._active_erasers() if scale != 1 else ():
            self.unscaled[name].append((scale, self.scaling[name]))
            self._write_scale(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Take back `scale_layer(scale)`, to the bit; without a number, set all scales to 1."""
        for name in self._active_erasers() if scale != 1 else ():
            scaled = self.unscaled[name]
            if scale is None:
                self.set_scale(name, 1.0)
            elif scaled and scaled[-1][0] == scale:
                self._write_scale(name, scaled.pop()[1])
            else:
                self._write_scale(name, self.scaling[name] / scale)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge an eraser, by `NotImplementedError`; nothing happens where none is to be merged."""
        names = self.active_adapters if adapter_names is None else adapter_names
        erasers = [name for name in names if name in self.eraser_down]
        if erasers and any(self.kinds[name] == "gelu" for name in erasers):
            refuse_merge(erasers)
        elif erasers:
            raise NotImplementedError(f"Linear erasers are merged by `merge_eraser`, got {erasers}.")

    def unmerge(self) -> None:
        """Do nothing: an eraser is never merged."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a LoRA can stand for it: for a linear one, as `eraser_to_lora` writes it; not by PEFT's own way."""
        return False

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete one eraser; the last takes the hooks with it."""
        self._fused = {}
        super().delete_adapter(adapter_name)
        if not self.eraser_down:
            self.forget_attention()

    def watch_attention(self, attention: nn.Module) -> None:
        """Add to the video tokens whenever `attention` has run, until `forget_attention`."""
        if not self.video_alone and "gelu" not in self._hooks:
            hook = _add_to_stream if self.video_rows else _add_to_video
            self._hooks["gelu"] = attention.register_forward_hook(hook, with_kwargs=hook is _add_to_stream)
        if "linear" not in self._hooks and "linear" in self.kinds.values():
            projection = output_projection(attention)
            self._hooks["linear"] = projection.register_forward_hook(_ProjectionHook(self, attention))
        self._remove_hooks_with_layer()

    def forget_attention(self) -> None:
        """Remove the hooks of `watch_attention`."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fused": {}}  # a copy fuses its own weights

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._remove_hooks_with_layer()

    def _remove_hooks_with_layer(self) -> None:
        # diffusers' `unload_lora` drops layers without a word to them.
        for hook in self._hooks.values():
            weakref.finalize(self, hook.remove)

    def _apply(self, *args: Any, **kwargs: Any) -> EraserLayer:
        self._fused = {}
        return super()._apply(*args, **kwargs)

    def _write_scale(self, adapter: str, scale: float) -> None:
        self.scaling[adapter] = scale
        self.scale_tensors[adapter].fill_(scale)


def check_scale(adapter_name: str, scale: float) -> None:
    """Raise `ValueError` unless the scale of an eraser is a finite number of at least 0."""
    if not 0 <= scale < float("inf"):
        raise ValueError(
            f"`scale` of the eraser {adapter_name!r} must be a finite number of at least 0, got "
            f"{scale}: a negative one strengthens the concept. 0 is the model without the eraser."
        )


def refuse_merge(names: list[str]) -> None:
    """Raise the error of a merge."""
    raise NotImplementedError(
        f"Erasers cannot be merged into the model, got {names}: GELU lies between their two "
        "projections. To fuse a LoRA beside them, name it in `adapter_names`."
    )


def _add_to_video(attention: nn.Module, _: tuple, output: Any) -> Any:
    # The layer is looked up, not bound, so that the hook of a deep copy serves the copy; as `to_out[1]`, but faster.
    layer = attention._modules["to_out"]._modules["1"]
    if not isinstance(layer, EraserLayer):
        return output
    if not isinstance(output, tuple) or len(output) < 2:
        raise ValueError(
            f"A joint attention with an eraser must give (video, text), got a {type(output).__name__} from "
            f"{type(attention.processor).__name__}. Set a processor of CogVideoX, or the model's own."
        )
    return layer.add_to_video(output[0]), *output[1:]


def _add_to_stream(attention: nn.Module, _: tuple, arguments: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
    layer = attention._modules["to_out"]._modules["1"]
    return layer.add_to_video(output, arguments) if isinstance(layer, EraserLayer) else output


class _ProjectionHook:
    """Lets the linear erasers of a layer add to an output projection; it does not keep the layer alive."""

    def __init__(self, layer: EraserLayer, attention: nn.Module) -> None:
        self._layer, self._attention = weakref.ref(layer), weakref.ref(attention)

    def __reduce__(self) -> tuple[type[_ProjectionHook], tuple[EraserLayer, nn.Module]]:
        return type(self), (self._layer(), self._attention())  # the hook of a copy serves the copy

    def __call__(self, projection: nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor:
        layer, attention = self._layer(), self._attention()
        if layer is None or attention is None or attention._modules["to_out"]._modules["1"] is not layer:
            return output
        return layer.add_to_projection(output, arguments[0])
