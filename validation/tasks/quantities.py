"""Quantities with clinical units, compared exactly: `0.5 mg` is `500 µg`, `5.0×10⁹/L` is `5000/µL`.

Numbers are fractions, never floats, so that a bound that is met exactly is met. Factors are the SI's, and the
conventional millimetre of mercury (133.322387415 Pa) and centimetre of water (98.0665 Pa). Between mass and
amount of substance there is no conversion: it would need the molar mass.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from validation.errors import MeasurementError

_PREFIXES = {"k": 3, "": 0, "d": -1, "c": -2, "m": -3, "u": -6, "n": -9, "p": -12, "f": -15}
_SCALABLE = {"g": "g", "l": "L", "mol": "mol", "m": "m", "pa": "Pa"}
"""Units that take a prefix, lower case, and the base each is counted in."""
_FIXED = {
    "mcg": ("g", Fraction(1, 10**6)),
    "mmhg": ("Pa", Fraction(133322387415, 10**9)),
    "cmh2o": ("Pa", Fraction(980665, 10**4)),
    "meq": ("Eq", Fraction(1, 1000)),
    "kcal": ("cal", Fraction(1000)),
    "m2": ("m²", Fraction(1)),
    "1.73m2": ("1.73 m²", Fraction(1)),
    "unit": ("U", Fraction(1)),
    "units": ("U", Fraction(1)),
    "s": ("s", Fraction(1)),
    "sec": ("s", Fraction(1)),
    "min": ("s", Fraction(60)),
    "h": ("s", Fraction(3600)),
    "hr": ("s", Fraction(3600)),
    "hour": ("s", Fraction(3600)),
    "hours": ("s", Fraction(3600)),
    "d": ("s", Fraction(86400)),
    "day": ("s", Fraction(86400)),
    "days": ("s", Fraction(86400)),
    "%": ("", Fraction(1, 100)),
    "℃": ("°C", Fraction(1)),
    "°c": ("°C", Fraction(1)),
}
_UNITS_OF_ACTION = {"": 0, "m": -3, "k": 3, "M": 6}
"""Prefixes of IU and U are read with their case: MIU is a million units, mIU a thousandth of one."""
_CHINESE = {
    "毫克": "mg", "微克": "ug", "纳克": "ng", "千克": "kg", "公斤": "kg", "克": "g",
    "毫升": "mL", "微升": "uL", "升": "L", "毫摩尔": "mmol", "微摩尔": "umol", "摩尔": "mol",
    "小时": "h", "分钟": "min", "秒": "s", "天": "d", "日": "d", "国际单位": "IU", "单位": "U",
    "厘米": "cm", "毫米": "mm", "毫米汞柱": "mmHg",
}  # fmt: skip
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?P<digits>\d{1,3}(?:,\d{3})+|\d+)(?P<part>\.\d+)?"
    r"(?:[eE](?P<exp>[+-]?\d{1,3})|[x×*·]10\^?(?P<power>[+-]?\d{1,3}))?"
)
_POWER = re.compile(r"10\^?(\d{1,3})")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")


@dataclass(frozen=True)
class Quantity:
    """A value in base units, and its dimension as sorted (base, exponent) pairs."""

    value: Fraction
    dimension: tuple[tuple[str, int], ...]
    scale: Fraction = Fraction(1)
    """One of the unit as written, in base units: 10⁹/L of `5.0×10⁹/L`."""

    @property
    def has_unit(self) -> bool:
        """Whether a unit was named; a plain number has none (`%` is a hundredth, not a unit)."""
        return bool(self.dimension)


def parse_quantity(text: str) -> Quantity | None:
    """The quantity that is the whole of `text`; None if there is more or less than one number and its unit.

    `20-30 mg` and `500 mg twice daily` are None: a range or a rest is not an answer to "how much".
    """
    # Superscripts first: NFKC would make 10⁹ the number 109.
    text = unicodedata.normalize("NFKC", text.translate(_SUPERSCRIPTS)).replace("μ", "u").replace("µ", "u")
    text = "".join(text.split()).strip("*_`$").replace("−", "-")
    found = _NUMBER.match(text)
    if found is None:
        return None
    value = Fraction(found["digits"].replace(",", "") + (found["part"] or ""))
    if found["sign"] == "-":
        value = -value
    unit = parse_unit(text[found.end() :])
    if unit is None:
        return None
    scale = unit.value * Fraction(10) ** int(found["power"] or 0)
    return Quantity(value * Fraction(10) ** int(found["exp"] or 0) * scale, unit.dimension, scale)


def parse_unit(text: str) -> Quantity | None:
    """The unit `text`, such as `mg/kg/d`, `10^9/L` or `毫克`, as one of it; None if it is not known."""
    text = unicodedata.normalize("NFKC", text.translate(_SUPERSCRIPTS)).replace("μ", "u").replace("µ", "u")
    parts = "".join(text.split()).strip(".").replace("每", "/").split("/")
    value, dimension = Fraction(1), dict[str, int]()
    for place, part in enumerate(parts):
        if not part and place == 0:
            continue  # "/L": one per litre
        power = _POWER.fullmatch(part)
        atom = (("", Fraction(10) ** int(power[1])) if power else None) or _atom(part)
        if atom is None:
            return None
        base, factor = atom
        sign = 1 if place == 0 else -1
        value *= factor**sign
        if base:
            dimension[base] = dimension.get(base, 0) + sign
    return Quantity(value, tuple(sorted((b, e) for b, e in dimension.items() if e)), value)


def quantity(text: str, unit: str = "", where: str = "the answer") -> Quantity:
    """The quantity `text`, in `unit` if it names none itself.

    Raises:
        MeasurementError: no number, or a unit that is not known.
    """
    own = parse_quantity(text)
    if own is not None and own.has_unit:
        return own
    named = parse_unit(unit)
    if own is None or named is None:
        raise MeasurementError(
            f"{where}: {text!r}{f' in {unit!r}' if unit else ''} is not a number with a unit known here",
            "Known are g, L, mol, m, Pa with prefixes, mmHg, s, min, h, d, IU, U, %, °C, and quotients.",
        )
    return Quantity(own.value * named.value, named.dimension, own.scale * named.value)


def _atom(text: str) -> tuple[str, Fraction] | None:
    """(base, factor) of one unit without a quotient."""
    text = _CHINESE.get(text, text)
    action = re.fullmatch(r"([mkM]?)(IU|iu|U)", text)
    if action:
        base = "IU" if action[2].upper() == "IU" else "U"
        return base, Fraction(10) ** _UNITS_OF_ACTION[action[1]]
    small = text.lower()
    if small in _FIXED:
        return _FIXED[small]
    for name, base in _SCALABLE.items():
        if small.endswith(name) and small[: -len(name)] in _PREFIXES:
            return base, Fraction(10) ** _PREFIXES[small[: -len(name)]]
    return None
