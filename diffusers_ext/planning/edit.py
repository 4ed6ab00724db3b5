"""The run of an edit of knowledge: where text alone is read, the prompts, and the systems that are solved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil

import torch

from diffusers_ext.nullspace.edit_equations import TargetRows, edit_factors, effect_moments, layer_report
from diffusers_ext.planning.models import BaseModel, ImageShapes, encode_prompts_work, guided_work
from diffusers_ext.planning.settings import EditPlanSettings
from diffusers_ext.planning.tracing import REPORT_BYTES
from diffusers_ext.planning.work import WEIGHT_DTYPES, Draft, Job, Phase, Precision, Work

_EMBEDDERS = {"context_embedder", "text_embedder"}
_PROBED_PIXELS = 16  # latent ones of a side
_PROBING_CALLS = 8  # three runs of two steps, one of them twice as wide
_RATES = (
    "Arithmetic in float64 is counted at the rate of float32, and what solving and decomposing take beyond their "
    "traffic is not: take the time of `gpu` 'here' where that matters."
)


def draft_edit(base: BaseModel, setting: EditPlanSettings, *, as_on_gpu: bool = True) -> Draft:
    """The phases of an edit; `ValueError` for a pipeline that it cannot plan."""
    run = EditRun(ImageShapes(base), setting, as_on_gpu)
    dtype = run.precision.dtype
    parts = {name.replace("_", " "): base.component(name).bytes(dtype) for name in base.components}
    notes = [
        f"{setting.num_preserved_prompts} preserved prompts of {setting.words_per_prompt} words, "
        f"{setting.num_edited_prompts} prompts of each edit, and a rank of {setting.rank} in the file.",
        _RATES,
    ]
    return Draft("edit", base, asdict(setting), parts, run.phases(tuple(parts)), run.disk(), notes)


@dataclass(frozen=True)
class EditRun:
    """A base model and how much of it is edited, as shapes."""

    shapes: ImageShapes
    setting: EditPlanSettings
    as_on_gpu: bool = True

    @property
    def precision(self) -> Precision:
        """Of the pipeline's calls."""
        return Precision(WEIGHT_DTYPES[self.setting.mixed_precision], self.as_on_gpu)

    def linears(self) -> dict[str, tuple[int, int]]:
        """`{dotted name: (out, in)}` of the Linears that read the text as the denoiser is handed it, by their widths.

        K and V of cross-attention, and what embeds text before the blocks; deeper ones are small beside them.
        """
        widths = {self.shapes.text.width, self.shapes.text.pooled}
        denoiser = self.shapes.base.component(self.shapes.base.denoiser).build()
        return {
            name: (module.out_features, module.in_features)
            for name, module in denoiser.named_modules()
            if isinstance(module, torch.nn.Linear)
            and module.in_features in widths
            and (name.endswith(("attn2.to_k", "attn2.to_v")) or {*name.split(".")} & _EMBEDDERS)
        }

    def phases(self, loaded: tuple[str, ...]) -> list[Phase]:
        """In order; `loaded` are all parts."""
        setting, shapes = self.setting, self.shapes
        scale = 2 ** (len(shapes.base.component("vae").whole_config().block_out_channels) - 1)
        small = ImageShapes(shapes.base, _PROBED_PIXELS * scale)
        rows = min(setting.batch_size, setting.num_texts)
        text = encode_prompts_work(shapes, rows, ceil(setting.num_texts / rows), self.precision)
        return [
            Phase("probing", loaded, [guided_work(small, 1, 1.0, _PROBING_CALLS, self.precision)]),
            Phase("reading prompts", loaded, [text]),
            Phase("solving", loaded, [self.solving_work(width) for width in sorted(self.widths)]),
        ]

    @property
    def widths(self) -> set[int]:
        """Of the texts that anything reads."""
        return {width for _, width in self.linears().values()}

    def solving_work(self, width: int) -> Work:
        """One system, and the update of all Linears that read this text."""
        shapes = [out for out, read in self.linears().values() if read == width]
        rank, hard, dtype = min(self.setting.rank, width), self.setting.hard, self.precision.dtype

        def make() -> Job:
            with torch.device("meta"):
                linears = [torch.nn.Linear(width, out, bias=False, dtype=dtype) for out in shapes]
            read = torch.nn.ModuleList(linears).requires_grad_(False)
            return Job([read], lambda device: torch.no_grad()(begin(read, device)))

        def begin(linears: torch.nn.ModuleList, device: torch.device) -> Callable[[], object]:
            wide = {"dtype": torch.float64, "device": device}
            of_a_prompt = self.shapes.text.tokens if width == self.shapes.text.width else 1
            tokens = min(width, self.setting.num_edits * self.setting.num_edited_prompts * of_a_prompt)
            c2, c0 = (x @ x.T / width for x in torch.randn(2, width, width, **wide))
            if hard:  # what is preserved leaves half of all directions
                c0[width // 2 :], c0[:, width // 2 :] = 0, 0
            else:  # targets are told apart at the first attempt
                c0 *= 1e-6
            change = torch.randn(tokens, rank, **wide) @ torch.randn(rank, width, **wide) / width
            targets = TargetRows(change, torch.randn(tokens, width, **wide) / width**0.5)

            def repeat() -> None:
                left, a, _ = edit_factors(targets, c0, preserve_weight=1.0, eps=1e-4, kept=0.999, hard=hard)
                missed, moved = effect_moments(left, a, targets, c2, c0)
                metric = torch.zeros_like(c0)
                for linear in linears:
                    own = linear.weight.double().T @ linear.weight.double()
                    metric += own
                    layer_report(own, missed, moved, c2, c0)

            return repeat

        return Work("edit's matrices", 1, make)

    def disk(self) -> dict[str, int]:
        """Files that it leaves, in float32; twice where other programs have names for them."""
        rank = self.setting.rank
        lora = 4 * sum(min(rank, width) * (out + width) for out, width in self.linears().values())
        copies = 2 if self.shapes.base.denoiser == "unet" else 1
        rows = 256 * len(self.linears()) + 50 * self.setting.num_preserved_prompts
        return {"LoRA": copies * lora, "report": REPORT_BYTES // 8 + rows}
