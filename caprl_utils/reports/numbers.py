"""The one formatter of numbers in tables, figures and reports.

It never hides a difference: values that are not equal never print the same beside each other, a value
that is not 0 or 100 % never prints as such, and a difference that is not zero shows its sign. Where the
usual digits are too few, the values concerned get more. Rounding is half up on the decimal form, so 41.25
prints as 41.3 everywhere.
"""

from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal

MISSING = "–"
EQUAL_BELOW = 1e-9  # ours: nearer values differ only by the order of a summation
_MAX_DECIMALS = 12


def percent(value: float | None, decimals: int = 1) -> str:
    """A share as percent without the sign: 0.4125 -> "41.3"; None -> a dash."""
    return percents([value], decimals)[0]


def percents(values: Sequence[float | None], decimals: int = 1) -> list[str]:
    """Shares that are read beside each other, as percent: [0.65604, 0.656] -> ["65.604", "65.600"]."""
    return _distinct([None if v is None else 100 * _exact(v) for v in values], decimals, anchors=(0, 100))


def number(value: float | None, decimals: int = 1) -> str:
    """A plain number such as a mean of tokens: 61.25 -> "61.3"; None -> a dash."""
    return numbers([value], decimals)[0]


def numbers(values: Sequence[float | None], decimals: int = 1) -> list[str]:
    """Plain numbers that are read beside each other."""
    return _distinct([None if v is None else _exact(v) for v in values], decimals, anchors=(0,))


def difference(value: float | None, decimals: int = 1) -> str:
    """A difference of shares in percentage points, with its sign: 0.213 -> "+21.3"."""
    return differences([value], decimals)[0]


def differences(values: Sequence[float | None], decimals: int = 1) -> list[str]:
    """Differences of shares that are read beside each other."""
    texts = _distinct([None if v is None else 100 * _exact(v) for v in values], decimals, anchors=(0,))
    return [f"+{t}" if v is not None and _exact(v) > 0 else t for v, t in zip(values, texts, strict=True)]


def interval(bounds: Sequence[float] | None, signed: bool = False, decimals: int = 1) -> str:
    """An interval of shares in percent: (0.38, 0.443) -> "[38.0, 44.3]"; `signed` for a difference."""
    if bounds is None:
        return MISSING
    low, high = (differences if signed else percents)(list(bounds), decimals)
    return f"[{low}, {high}]"


def p_value(p: float | None) -> str:
    """A p-value with three decimals; below that "p < 0.001", never "p = 0.000"."""
    if p is None:
        return MISSING
    if not 0 <= p <= 1:
        raise ValueError(f"a p-value lies in [0, 1], got {p}")
    return "p < 0.001" if p < 0.001 else f"p = {_round(_exact(p), 3)}"


def count(value: int | None) -> str:
    """A whole number with thousands separated: 10000 -> "10,000"."""
    return MISSING if value is None else f"{value:,}"


def _exact(value: float) -> Decimal:
    """The value, free of the noise of float summation."""
    return Decimal(repr(round(float(value), 15)))


def _round(value: Decimal, decimals: int) -> str:
    rounded = value.quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_HALF_UP)
    return f"{abs(rounded) if rounded == 0 else rounded:f}"  # no "-0.0"


def _distinct(values: Sequence[Decimal | None], decimals: int, anchors: Sequence[int]) -> list[str]:
    """Texts of the values; those that would print like another value, or like an anchor, get more digits."""
    everything = [*values, *(Decimal(a) for a in anchors)]
    digits = [decimals] * len(everything)
    while True:
        texts = [MISSING if v is None else _round(v, d) for v, d in zip(everything, digits, strict=True)]
        clashing = _clashes(everything, texts)
        if not clashing or max(digits) >= _MAX_DECIMALS:
            return texts[: len(values)]
        for index in clashing:
            digits[index] += 1


def _clashes(values: Sequence[Decimal | None], texts: Sequence[str]) -> set[int]:
    """Positions whose text is that of a different value."""
    groups: dict[str, list[int]] = {}
    for index, text in enumerate(texts):
        if values[index] is not None:
            groups.setdefault(text, []).append(index)
    return {
        i
        for group in groups.values()
        if max(values[i] for i in group) - min(values[i] for i in group) > Decimal(EQUAL_BELOW)
        for i in group
    }
