"""The formats in which a cache can hold logits, each with its size, its error and what it does not promise.

`fp16` is the default (see precision.py). The square-companded formats are smaller: of a row with maximum m and
range r (both fp32), value x is kept as the b-bit integer q nearest to (2^b - 1) sqrt((m - x) / r), so steps are
finest at the maximum, where the probability is. On synthetic rows exponents of 2.25 to 3 have a quarter less error
than 2; the square stays, since IEEE 754 rounds sqrt correctly everywhere and a power it does not: other machines
would write other bytes. What they give up: the error grows with the range of the row, so one logit far below the
others costs the precision of all; measure it (`worst_kl`) on the rows that are stored.

Integers of more than 8 bits are kept in two planes: C low bytes, then the high bits, packed (big-endian, the last
byte padded with zeros).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mmkd.cache_tools.cache.softmax import kl_divergence
from mmkd.cache_tools.frames.records import Float32Array, Float64Array, UInt8Array
from mmkd.data_manifests.errors import InputError

Float16Array = npt.NDArray[np.float16]


FORMAT = "fp16-minus-row-maximum"


def encode_logits(logits: Float32Array) -> tuple[Float16Array, Float32Array]:
    """Encode float32 (..., C) as (fp16 (..., C) in -65504..0, fp32 row maxima (...)).

    Rows must be finite. Raises ValueError for a value more than 65504 below its row's maximum, which fp16
    cannot hold.
    """
    maximum = logits.max(axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        # An infinite value, or a range beyond float32, is refused below, without NumPy's warning first.
        shifted = logits - maximum[..., None]
    if not np.isfinite(shifted).all() or shifted.min(initial=0) < np.finfo(np.float16).min:
        raise ValueError("logits must be finite and lie within 65504 below their row's maximum")
    return shifted.astype(np.float16), maximum


def decode_logits(shifted: Float16Array, maximum: Float32Array) -> Float32Array:
    """Return float32 (..., C) from what `encode_logits` made; NaN rows stay NaN."""
    return shifted.astype(np.float32) + maximum[..., None]


MAX_RANGE = float(np.finfo(np.float16).max)
"""Largest distance below its row's maximum of a logit that is stored, 65504, in every format."""

TEMPERATURES = tuple(range(1, 11))
"""Temperatures at which a format's error is measured."""

Parts = Mapping[str, npt.NDArray[Any]]
"""Part name -> array (..., and what the part holds of one row)."""


@dataclass(frozen=True)
class StoredPart:
    """One of the arrays that hold the logits of one expert's head."""

    name: str
    """`logits`, `maximum` or `range`."""
    dtype: str
    """NumPy type name."""
    shape: tuple[int, ...]
    """What it holds of one view, after rows and views; () for a number."""
    fill: float
    """Value where nothing is computed; rows whose parts are all filled decode to NaN."""


class StorageFormat(Protocol):
    """How rows of logits become arrays, and come back."""

    @property
    def key(self) -> str:
        """Its name in recipes, e.g. `12-bit`."""
        ...

    @property
    def name(self) -> str:
        """Its name in fingerprints and metadata."""
        ...

    def parts(self, classes: int) -> tuple[StoredPart, ...]:
        """Return the arrays that a head of `classes` classes needs."""
        ...

    def encode(self, logits: Float32Array) -> dict[str, npt.NDArray[Any]]:
        """Encode float32 (..., C) as part name -> array; a row of NaN alone is stored as its parts' fill.

        Raises ValueError for any other row that `storable` denies.
        """
        ...

    def decode(self, parts: Parts, *, classes: int) -> Float32Array:
        """Return float32 (..., C) from what `encode` made; NaN rows stay NaN."""
        ...

    def error_bound(self, decoded: Float32Array) -> Float64Array:
        """Return (..., C) by how much each computed logit may differ at most from the decoded one."""
        ...


def storable(logits: Float32Array) -> npt.NDArray[np.bool_]:
    """Return (...) whether each row of (..., C) is finite and within 65504 of its maximum."""
    with np.errstate(invalid="ignore", over="ignore"):
        mask: npt.NDArray[np.bool_] = np.isfinite(logits).all(-1) & (logits.max(-1) - logits.min(-1) <= MAX_RANGE)
    return mask


@dataclass(frozen=True)
class Fp16:
    """fp16 minus the row's maximum; 2 bytes a class and 4 a row.

    Logits less than 3e-8 below a maximum may become equal to it, so argmax (the first of equals) may change there.
    """

    key: str = "fp16"
    """Name in recipes."""
    name: str = FORMAT
    """Name in fingerprints."""

    def parts(self, classes: int) -> tuple[StoredPart, ...]:
        """Return the arrays that a head needs."""
        nan = float("nan")
        return StoredPart("logits", "float16", (classes,), nan), StoredPart("maximum", "float32", (), nan)

    def encode(self, logits: Float32Array) -> dict[str, npt.NDArray[Any]]:
        """Encode float32 (..., C); see `StorageFormat.encode`."""
        arrays, present = filled(self, logits)
        arrays["logits"][present], arrays["maximum"][present] = encode_logits(logits[present])
        return arrays

    def decode(self, parts: Parts, *, classes: int) -> Float32Array:
        """Return float32 (..., C)."""
        return decode_logits(parts["logits"], parts["maximum"])

    def error_bound(self, decoded: Float32Array) -> Float64Array:
        """Return half a step of fp16 at each value, plus the float32 roundings of encoding and decoding."""
        below, rounding = distance_below(decoded)
        # Near the upper end of a binade a value may have been rounded up from beyond the decoded one's binade.
        return step_size(below + rounding, mantissa_bits=10, lowest_exponent=-14) / 2 + rounding


@dataclass(frozen=True)
class SquareCompanded:
    """m - r (q / (2^b - 1))^2 with b-bit integers q; ceil(b C / 8) + 8 bytes a row.

    The maximum itself is exact, and q is 0 for it alone: what was below the maximum stays below it, in float32
    too, so argmax never changes.
    """

    bits: int
    """b, 8..16; larger is more exact: an error of half a step is about r u / 2^b at m - r u^2."""

    def __post_init__(self) -> None:
        """Raise ValueError for a width that two planes cannot hold."""
        if not 8 <= self.bits <= 16:
            raise ValueError(f"8 to 16 bits, not {self.bits}")

    @property
    def key(self) -> str:
        """Name in recipes."""
        return f"{self.bits}-bit"

    @property
    def name(self) -> str:
        """Name in fingerprints."""
        return f"square-companded-{self.bits}-bit"

    @property
    def largest(self) -> int:
        """The integer that stands for the row's minimum, 2^b - 1."""
        return int(2**self.bits - 1)

    def parts(self, classes: int) -> tuple[StoredPart, ...]:
        """Return the arrays that a head needs."""
        packed = classes + -(-classes * (self.bits - 8) // 8)
        numbers = (StoredPart(name, "float32", (), float("nan")) for name in ("maximum", "range"))
        return StoredPart("logits", "uint8", (packed,), 0), *numbers

    def encode(self, logits: Float32Array) -> dict[str, npt.NDArray[Any]]:
        """Encode float32 (..., C); see `StorageFormat.encode`."""
        arrays, present = filled(self, logits)
        rows = logits[present]
        maximum = rows.max(-1)
        # In float64, since a distance rounded to float32 would now and then give the next integer.
        below = maximum[:, None].astype(np.float64) - rows
        extent = below.max(-1).astype(np.float32)
        # By the rounded range, the one that decoding has; 1 for equal logits, where 0 / 0 would be NaN.
        scale = np.where(extent > 0, extent, 1).astype(np.float64)[:, None]
        integers = np.rint(self.largest * np.sqrt(below / scale))
        integers[below > 0] = np.maximum(integers[below > 0], 1)  # 0 is the maximum's alone: argmax stays
        arrays["logits"][present] = pack(integers.astype(np.uint16), self.bits)
        arrays["maximum"][present], arrays["range"][present] = maximum, extent
        return arrays

    def decode(self, parts: Parts, *, classes: int) -> Float32Array:
        """Return float32 (..., C)."""
        integers = unpack(parts["logits"], self.bits, classes=classes)
        maximum, extent = (parts[name][..., None] for name in ("maximum", "range"))
        share = integers / self.largest
        value = (maximum - extent.astype(np.float64) * share**2).astype(np.float32)
        # Rounded to float32, a step near a large maximum may vanish: the next number below is nearer to the truth.
        next_below = np.nextafter(maximum, np.finfo(np.float32).min)
        decoded: Float32Array = np.where(integers > 0, np.minimum(value, next_below), value)
        return decoded

    def error_bound(self, decoded: Float32Array) -> Float64Array:
        """Return half a step of the integers at each value, plus the float32 roundings.

        Between q - 1/2 and q + 1/2 lie values up to r (q + 1/4) / (2^b - 1)^2 away; q = 1 reaches down to 0.
        """
        below, rounding = distance_below(decoded)
        extent = below.max(-1, keepdims=True)
        integers = self.largest * np.sqrt(below / np.where(extent > 0, extent, 1))
        steps = extent * (integers + 0.25) / self.largest**2
        bound: Float64Array = np.where(below > 0, steps, 0) + rounding
        return bound


FORMATS: Mapping[str, StorageFormat] = {
    known.key: known for known in (Fp16(), SquareCompanded(12), SquareCompanded(9), SquareCompanded(8))
}
"""Name in recipes -> format, the most exact first."""


def format_of(name: str) -> StorageFormat:
    """Return the format with this name in metadata; InputError lists the known ones."""
    for known in FORMATS.values():
        if known.name == name:
            return known
    names = ", ".join(known.name for known in FORMATS.values())
    raise InputError(f"logits are stored as {name!r}, which this version cannot read; it reads {names}")


def bytes_per_row(storage: StorageFormat, classes: int) -> int:
    """Return the bytes of one view of one head of one expert, before compression."""
    return sum(int(np.dtype(part.dtype).itemsize * np.prod(part.shape)) for part in storage.parts(classes))


def worst_kl(storage: StorageFormat, logits: Float32Array, temperatures: Sequence[float] = TEMPERATURES) -> float:
    """Return the largest KL(computed || stored) in nats over the rows (..., C) and temperatures; 0 without rows.

    Rows of NaN are left out.
    """
    rows = logits[~np.isnan(logits).all(-1)]
    decoded = storage.decode(storage.encode(rows), classes=logits.shape[-1])
    return max(float(kl_divergence(rows, decoded, t).max(initial=0.0)) for t in temperatures)


def filled(
    storage: StorageFormat, logits: Float32Array
) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.bool_]]:
    """Return the parts of rows (..., C) filled with nothing, and (...) which rows hold something.

    Raises ValueError for a row that is not NaN as a whole and cannot be stored.
    """
    grid, classes = logits.shape[:-1], logits.shape[-1]
    present = np.asarray(~np.isnan(logits).all(-1))
    if not storable(logits[present]).all():
        raise ValueError("logits must be finite and lie within 65504 below their row's maximum")
    return {
        part.name: np.full((*grid, *part.shape), part.fill, part.dtype) for part in storage.parts(classes)
    }, present


def distance_below(decoded: Float32Array) -> tuple[Float64Array, Float64Array]:
    """Return (..., C) how far each value lies below its row's maximum, and a bound of its float32 roundings."""
    maximum = decoded.max(-1, keepdims=True)
    below: Float64Array = maximum.astype(np.float64) - decoded
    largest = np.maximum(np.maximum(np.abs(decoded), np.abs(maximum)), below)
    return below, 2 * step_size(largest, mantissa_bits=23, lowest_exponent=-126)


def step_size(values: npt.NDArray[np.floating], *, mantissa_bits: int, lowest_exponent: int) -> Float64Array:
    """Return the distance between neighbours at positive values (...) in a binary format, in float64.

    It is np.spacing, without its overflow at a format's largest number; NaN stays NaN.
    """
    known = ~np.isnan(values)
    # frexp's mantissa is below 1, IEEE 754's below 2: one less. Subnormal numbers keep the lowest step.
    exponents = np.maximum(np.frexp(np.where(known, values, 0))[1] - 1, lowest_exponent)
    steps: Float64Array = np.where(known, np.ldexp(1.0, exponents - mantissa_bits), np.nan)
    return steps


def pack(integers: npt.NDArray[np.uint16], bits: int) -> UInt8Array:
    """Pack integers (..., C) of `bits` bits (8..16) into bytes (..., C + ceil(C (bits - 8) / 8))."""
    low = (integers & 0xFF).astype(np.uint8)
    if bits == 8:
        return low
    high = (integers >> 8).astype(np.uint8)
    # The most significant bit comes first: of a high byte the first 16 - bits are always 0, and left out.
    flat = np.unpackbits(high[..., None], axis=-1)[..., 16 - bits :]
    flat = flat.reshape(*high.shape[:-1], high.shape[-1] * (bits - 8))
    return np.concatenate([low, np.packbits(flat, axis=-1)], axis=-1)


def unpack(packed: UInt8Array, bits: int, *, classes: int) -> npt.NDArray[np.uint16]:
    """Return the integers (..., `classes`) that `pack` packed."""
    low = packed[..., :classes].astype(np.uint16)
    if bits == 8:
        return low
    width = bits - 8
    flat = np.unpackbits(packed[..., classes:], axis=-1, count=classes * width)
    # packbits fills a byte from the top, so what has fewer than eight bits stands too high in it.
    high = (np.packbits(flat.reshape(*low.shape, width), axis=-1)[..., 0] >> (8 - width)).astype(np.uint16)
    return np.bitwise_or(low, np.left_shift(high, np.uint16(8)))
