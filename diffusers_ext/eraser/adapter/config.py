"""Settings and size of a concept eraser, and the PEFT type they are saved under."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType

from diffusers_ext.eraser.adapter.projections import KINDS
from diffusers_ext.families.cogvideox import CogVideoX

PEFT_TYPE_NAME = "ERASER"
DEFAULT_TARGET = CogVideoX().eraser_target
DEFAULT_LAYERS_PATTERN = CogVideoX.blocks  # unless the model's family counts another list
MOST_LAYERS = 1000  # of any model; published ones have 42
_NAME = re.compile(r"\w+(\.\w+)*")
_REPEATS = re.compile(r"(?<!\\)[*+?{]")
_RISKY = re.compile(r"\(\?(?!:)|(?<!\\)\)[*+?{]|\\[1-9]")


def eraser_peft_type() -> PeftType:
    """The member `PeftType.ERASER`, added to PEFT's enumeration if it is not there yet.

    PEFT looks methods up by members of a closed enumeration and has no entry point for others, so the member is made
    the way `enum` makes its own.
    """
    if PEFT_TYPE_NAME in PeftType.__members__:
        return PeftType[PEFT_TYPE_NAME]
    member = str.__new__(PeftType, PEFT_TYPE_NAME)
    member._name_ = member._value_ = PEFT_TYPE_NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    setattr(PeftType, PEFT_TYPE_NAME, member)
    PeftType._member_names_.append(PEFT_TYPE_NAME)
    PeftType._member_map_[PEFT_TYPE_NAME] = member
    PeftType._value2member_map_[PEFT_TYPE_NAME] = member
    return member


@dataclass
class EraserConfig(PeftConfig):
    """Settings of one concept eraser.

    The eraser of a layer is `up(GELU(down(x)))`, added to the video tokens after the output projection of an
    attention; of the kind `"linear"`, `up(down(x))` of what that projection reads, added to what it puts out. The
    strength of a loaded eraser is no setting: it is the weight given to `set_adapters`, and multiplies what the eraser
    adds. A setting out of range is a `ValueError`, one of the wrong type a `TypeError`.
    """

    r: int = field(default=128, metadata={"help": "Width of the bottleneck; at most the width of the model."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Where the erasers sit: names, or one regular expression, of leaves "
            "`...to_out.1` of the attentions that the model's family names. By default those of all blocks."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names, or one regular expression, to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks that get an eraser; default all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks that `layers_to_transform` counts in."}
    )
    kind: str = field(
        default="gelu",
        metadata={"help": "`gelu`: `up(GELU(down(x)))` of the tokens; `linear`: a LoRA on the output projection."},
    )
    concept: str | None = field(default=None, metadata={"help": "What is erased."})
    anchor_concept: str | None = field(
        default=None, metadata={"help": "The word put in its place in training; none: no word."}
    )
    text_codebook_size: int | None = field(
        default=None,
        metadata={"help": "Tokens that text is rounded to where the eraser is at work; none: text stays as it is."},
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start with a zero `up`, which changes nothing; otherwise at random."}
    )
    in_features: int | None = field(
        default=None,
        metadata={"help": "Width of the model the eraser belongs to, the widest; filled in from the model."},
    )
    num_layers: int | None = field(
        default=None, metadata={"help": "Number of such attentions of that model; filled in from the model."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = eraser_peft_type()
        self._check_numbers()
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {KINDS}, got {self.kind!r}.")
        for name in ("concept", "anchor_concept"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"`{name}` must be a str or None, got {value!r}.")
        check_pattern("target_modules", self.target_modules)
        check_pattern("exclude_modules", self.exclude_modules)
        # PEFT puts these into an expression of its own.
        pattern = self.layers_pattern
        check_pattern("layers_pattern", [pattern] if isinstance(pattern, str) else pattern)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                "`layers_to_transform` must be None when `target_modules` is a regular expression, "
                f"got {self.layers_to_transform!r}. Put the layers into the expression."
            )
        if self.layers_to_transform is None and self.layers_pattern is not None:
            raise ValueError(
                f"`layers_pattern` must come with `layers_to_transform`, got {self.layers_pattern!r} alone."
            )
        if self.layers_to_transform is not None and self.layers_pattern is None:
            self.layers_pattern = DEFAULT_LAYERS_PATTERN
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name)
            setattr(self, name, set(names) if isinstance(names, (list, tuple)) else names)

    def _check_numbers(self) -> None:
        for name in ("r", "in_features", "num_layers", "text_codebook_size"):
            value = getattr(self, name)
            if value is None and name != "r":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"`{name}` must be an int, got {value!r}.")
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.num_layers is not None and self.num_layers > MOST_LAYERS:
            raise ValueError(f"`num_layers` must be at most {MOST_LAYERS}, got {self.num_layers}.")
        layers = self.layers_to_transform
        for layer in layers if isinstance(layers, (list, tuple)) else [layers]:
            if layers is not None and (not isinstance(layer, int) or isinstance(layer, bool)):
                raise TypeError(f"`layers_to_transform` must hold ints, got {layer!r}.")


def check_pattern(name: str, value: object) -> None:
    """Raise unless `value` is `None`, a list of module names, or an expression that no name can keep busy.

    A config may come from a stranger, and PEFT matches its expressions against every module. What is repeated must be
    a single character, and not often: repeated groups take time without end.
    """
    if value is None:
        return
    if not isinstance(value, str):
        if not isinstance(value, (list, tuple, set)) or not all(isinstance(v, str) for v in value):
            raise TypeError(f"`{name}` must be names or one regular expression, got {value!r}.")
        wrong = [one for one in value if not _NAME.fullmatch(one)]
        if wrong:
            raise ValueError(f"`{name}` must hold names of modules, got {wrong[0][:80]!r}.")
        return
    repeated = _REPEATS.findall(value)
    if len(value) > 1000 or len(repeated) > 3 or _RISKY.search(value):
        raise ValueError(
            f"`{name}` must be a regular expression without repeated groups, look-around and more "
            f"than three repetitions, got {value[:80]!r}. List the names of the modules instead."
        )
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"`{name}` must be a regular expression, got {value!r}: {error}.") from error


def transformer_width(transformer_config: Mapping[str, Any]) -> int:
    """Width of the tokens between a transformer's blocks; a head is 64 wide where none is given, as CogVideoX's."""
    heads = int(transformer_config["num_attention_heads"])
    return heads * int(transformer_config.get("attention_head_dim", 64))


def check_rank(rank: int, width: int) -> None:
    """Raise `ValueError` unless `1 <= rank <= width`."""
    if not 1 <= rank <= width:
        raise ValueError(
            f"`rank` must be from 1 to the transformer's width {width}, got {rank}. "
            "128 is usual for the published models."
        )


def eraser_size(
    transformer_config: Mapping[str, Any], rank: int, num_layers: int | None = None, kind: str = "gelu"
) -> int:
    """Parameters of an eraser, `num_layers * (2 width rank + rank + width)`; without the biases for linear ones.

    Two Linears in each of `num_layers` blocks, all when `None`: `width -> rank -> width`. The config is that of a
    CogVideoX or Wan transformer.
    """
    width, blocks = transformer_width(transformer_config), int(transformer_config["num_layers"])
    check_rank(rank, width)
    layers = blocks if num_layers is None else num_layers
    if not 1 <= layers <= blocks:
        raise ValueError(f"`num_layers` must be from 1 to the transformer's {blocks}, got {num_layers}.")
    return layers * (2 * width * rank + (rank + width if kind == "gelu" else 0))
