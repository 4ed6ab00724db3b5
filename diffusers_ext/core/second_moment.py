"""Streaming uncentred second moments `C = sum(x x^T) / n` with float64 totals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch

from diffusers_ext.core.restored_state import held_attribute

GRAM_PRECISIONS = ("float32", "bf16x3")
# Widths whose Gram matrices are computed by halves, and how many columns at once.
_WIDE, _BLOCK = 1024, 256


@contextmanager
def exact_float32_matmul(device_type: str) -> Iterator[None]:
    """Products of float32 matrices in full float32, also under autocast: TF32 or bfloat16 would leave three digits.

    The precision is one of the whole process: it is back once the last of all threads is done.
    """
    with ExitStack() as stack:
        for setting, name, exact, write in _PRECISIONS:
            stack.enter_context(held_attribute(setting, name, exact, write))
        stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _set_precision(setting: object, name: str, precision: str) -> None:
    # Back to inheriting the precision of `torch.backends`, where that is what it did.
    setattr(setting, name, "none")
    if getattr(setting, name) != precision:
        setattr(setting, name, precision)


class _PrecisionOfAll:
    """What torch below 2.9 has in place of a precision of each device: one word for all."""

    @property
    def word(self) -> str:
        return torch.get_float32_matmul_precision()

    @word.setter
    def word(self, word: str) -> None:
        torch.set_float32_matmul_precision(word)


_PRECISIONS: list[tuple[object, str, str, Callable[[object, str, str], None]]] = (
    [
        (one, "fp32_precision", "ieee", _set_precision)
        for one in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    ]
    if hasattr(torch.backends.mkldnn, "matmul")
    else [(_PrecisionOfAll(), "word", "highest", setattr)]
)


def gram(features: torch.Tensor, dtype: torch.dtype = torch.float32, precision: str = "float32") -> torch.Tensor:
    """`X^T X` of features `(..., dim)`, computed in `dtype`; of wide ones the half of it that the other mirrors.

    Args:
        precision: of `GRAM_PRECISIONS`; `"bf16x3"` is `split_gram`, and leaves `dtype` alone.
    """
    rows = features.reshape(-1, features.shape[-1])
    if precision == "bf16x3":
        return split_gram(rows)
    rows = rows.to(dtype)
    with exact_float32_matmul(rows.device.type):
        return _mirrored_product(rows) if rows.shape[-1] >= _WIDE else rows.T @ rows


def split_gram(rows: torch.Tensor) -> torch.Tensor:
    """`X^T X` in float32 of rows `(tokens, dim)` by products of bfloat16 numbers, which tensor cores sum in float32.

    `X = H + M + r`, H the nearest bfloat16 numbers, M those of what is left, `|r| <= 2^-18 |X|`: `H^T H + H^T M +
    M^T H` leaves out at most `3 * 2^-18` of `|x_i|^T |x_j|` (Henry, Tang, Heinecke 2019, arXiv 1904.06376).
    Features that are bfloat16 are H alone, so that one product, half of it mirrored, is all there is.
    """
    high = rows.to(torch.bfloat16)
    product = _mirrored_product(high)
    if rows.dtype != torch.bfloat16:
        across = _split_product(high, (rows.float() - high.float()).to(torch.bfloat16))
        product += across + across.T
    return product


def _mirrored_product(x: torch.Tensor) -> torch.Tensor:
    """`X^T X`, of bfloat16 in float32."""
    product = x.new_empty(x.shape[1], x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    block = _BLOCK if x.shape[1] >= 2 * _BLOCK else x.shape[1] // 4 or 1
    for start in range(0, len(product), block):
        stop = start + block
        product[start:stop, start:] = _split_product(x[:, start:stop], x[:, start:])
        product[stop:, start:stop] = product[start:stop, stop:].T
    return product


def _split_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`X^T Y`, of bfloat16 with sums and result in float32."""
    if x.dtype != torch.bfloat16:
        return x.T @ y
    if x.device.type == "cuda" and "dtype" in torch.ops.aten.mm.overloads():  # from torch 2.8 on
        return torch.mm(x.T, y, out_dtype=torch.float32)
    with exact_float32_matmul(x.device.type):  # products of bfloat16 numbers are exact in float32
        return x.float().T @ y.float()


class SampledGram(NamedTuple):
    """An unbiased estimate of `X^T X` from some of its rows."""

    gram: torch.Tensor  # (dim, dim) float32
    variance: float  # estimate of `E|gram - X^T X|_F^2`


def sampled_gram(
    features: torch.Tensor, share: float, generator: torch.Generator, precision: str = "float32"
) -> SampledGram:
    """`X^T X` estimated from a share of the rows of features `(..., dim)`, drawn without replacement.

    `(N/m) sum_i x_i x_i^T` over `m = max(2, ceil(share N))` of `N` rows has the mean `X^T X` and the squared error
    `N^2 (1 - m/N) S^2 / m`, `S^2 = sum_i |x_i x_i^T - mean|_F^2 / (m - 1)` (Cochran: "Sampling Techniques", 2.3-2.5).
    Its eigenspaces are within `|error|_2 / gap` of the exact ones (Davis, Kahan 1970).
    """
    rows = features.reshape(-1, features.shape[-1])
    total = len(rows)
    drawn = min(total, max(2, math.ceil(share * total)))
    chosen = rows[torch.randperm(total, generator=generator)[:drawn].to(rows.device)]
    product = gram(chosen, precision=precision)
    if drawn == total:
        return SampledGram(product, 0.0)
    energies = chosen.double().square().sum(1)
    spread = (energies.square().sum() - product.double().square().sum() / drawn) / (drawn - 1)
    variance = total**2 * (1 - drawn / total) * spread.clamp_min(0) / drawn
    return SampledGram(product * (total / drawn), variance.item())


class SecondMoment:
    """The uncentred second moment of a stream of vectors, `C = (1/n) sum_i x_i x_i^T` over all vectors seen.

    It is uncentred because `D x = 0` on the preserved inputs is what keeps `(W + D) x = W x`; a centred form would let
    `D mean` through. Totals are sums, so parts of a stream can be merged and reduced over processes in any order.

    Args:
        compute_dtype: dtype of one update's Gram matrix; the running total is float64 always.
        precision: of float32's Gram matrices, as of `gram`.

    Attributes:
        total: `(dim, dim)` float64, `sum x x^T`.
        floor: eigenvalues below this share of the largest are rounding of the Gram matrices.
        variance: estimate of the squared error of `total`, where rows were drawn; 0 where all were read.
    """

    def __init__(
        self,
        dim: int,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype = torch.float32,
        precision: str = "float32",
    ) -> None:
        if dim < 1:
            raise ValueError(f"`dim` must be at least 1, got {dim}.")
        self.total = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.count = 0
        self.variance = 0.0
        self.compute_dtype, self.precision = compute_dtype, precision
        # Float64 sums of float32 features: their rounding has the energy (2^-24)^2, with a margin. A
        # float32 Gram matrix errs by up to 5e-7 of its largest eigenvalue.
        self.floor = 1e-12 if compute_dtype == torch.float64 else 1e-6
        if precision == "bf16x3":
            self.floor += 3 * 2**-18  # of `split_gram`

    @classmethod
    def from_total(cls, total: torch.Tensor, count: int, floor: float | None = None) -> SecondMoment:
        """Wrap a finished sum `(dim, dim)` of `count` vectors; `floor` is float64's when `None`."""
        moment = cls(total.shape[0], compute_dtype=torch.float64)
        moment.floor = moment.floor if floor is None else floor
        moment.total, moment.count = total.to(torch.float64), int(count)
        return moment

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.total.shape[0]

    @torch.no_grad()
    def update(self, features: torch.Tensor) -> SecondMoment:
        """Add vectors `(..., dim)` of any floating dtype; `check_finite` finds what is not."""
        if features.shape[-1] != self.dim:
            raise ValueError(
                f"`features` must have width {self.dim}, got {features.shape[-1]} (shape {tuple(features.shape)})."
            )
        self.total += gram(features, self.compute_dtype, self.precision).to(self.total.device)
        self.count += features.numel() // self.dim
        return self

    @torch.no_grad()
    def sample(self, features: torch.Tensor, share: float, generator: torch.Generator) -> SecondMoment:
        """Add vectors `(..., dim)` by `sampled_gram`: all are counted, a share of them is read."""
        estimate = sampled_gram(features, share, generator, self.precision)
        self.total += estimate.gram.to(self.total.device)
        self.variance += estimate.variance
        self.count += features.numel() // self.dim
        return self

    @property
    def sampling_error(self) -> float:
        """Relative error of the matrix by sampling, `sqrt(variance) / |total|_F`."""
        return math.sqrt(self.variance) / self.total.norm().item() if self.variance else 0.0

    def merge(self, other: SecondMoment) -> SecondMoment:
        """Add another stream's totals; exact up to the rounding of one float64 addition."""
        if other.dim != self.dim:
            raise ValueError(f"`other` must have width {self.dim}, got {other.dim}.")
        self.total += other.total.to(self.total.device)
        self.count += other.count
        self.floor = max(self.floor, other.floor)
        self.variance += other.variance
        return self

    def repeated(self, times: int) -> SecondMoment:
        """A copy as of the same stream seen `times` times."""
        copy = SecondMoment.from_total(self.total * times, self.count * times, self.floor)
        copy.variance = self.variance * times**2
        return copy

    def all_reduce(self) -> SecondMoment:
        """Sum over the processes of `torch.distributed`; does nothing in a single process."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            count = torch.tensor(self.count, dtype=torch.int64, device=self.total.device)
            torch.distributed.all_reduce(self.total)
            torch.distributed.all_reduce(count)
            self.count = int(count)
            variance = torch.tensor(self.variance, dtype=torch.float64, device=self.total.device)
            torch.distributed.all_reduce(variance)
            self.variance = variance.item()
        return self

    def check_finite(self, name: str = "features") -> None:
        """Raise `ValueError` if an infinite or not-a-number value was ever added."""
        trace = self.total.diagonal().sum().item()
        if not abs(trace) < float("inf"):
            raise ValueError(
                f"`{name}` must be finite, got a second moment of trace {trace}. "
                "Collect in bfloat16 or float32; float16 overflows in some models."
            )

    @property
    def mean(self) -> torch.Tensor:
        """`C`, `(dim, dim)` float64."""
        if self.count == 0:
            raise ValueError("`SecondMoment` must have seen at least one vector, got none.")
        return self.total / self.count


class LowRankMoment:
    """A second moment kept as its leading eigenvectors and an even spread of the rest.

    `C ~ U diag(values) U^T + rest (I - U U^T)`, `U` `(dim, k)` the orthonormal `vectors`. The trace is kept, and a
    direction outside `U` never looks emptier than the average of what was dropped: `rest`, energy per direction.
    """

    def __init__(self, vectors: torch.Tensor, values: torch.Tensor, rest: float, count: int) -> None:
        self.vectors, self.values, self.rest, self.count = vectors, values, float(rest), int(count)
        self.floor = 1e-6  # of the float32 eigenvectors

    @classmethod
    def from_moment(cls, moment: SecondMoment, energy: float) -> LowRankMoment:
        """Keep the fewest leading eigenvectors that hold the share `energy` of the trace."""
        values, vectors = torch.linalg.eigh(moment.mean)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        held = torch.cumsum(values, 0) / values.sum()
        kept = min(int((held < energy).sum()) + 1, moment.dim)
        spare = moment.dim - kept
        rest = float(values[kept:].sum()) / spare if spare else 0.0
        return cls(vectors[:, :kept].float(), values[:kept], rest, moment.count)

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.vectors.shape[0]

    @property
    def mean(self) -> torch.Tensor:
        """`C`, `(dim, dim)` float64."""
        vectors = self.vectors.double()
        identity = torch.eye(self.dim, dtype=torch.float64, device=vectors.device)
        return (vectors * (self.values - self.rest)) @ vectors.T + self.rest * identity

    def check_finite(self, name: str = "features") -> None:
        """Raise `ValueError` if a value is infinite or not a number."""
        if not torch.isfinite(self.values).all() or not torch.isfinite(self.vectors).all():
            raise ValueError(f"`{name}` must be finite, got a compressed moment that is not.")
