"""Extracts quantities from a product's text into a small vector: pieces in a pack, mass, volume, length and size.

Text embeddings hardly distinguish a pack of 6 from one of 12, but prices depend on it. Separate lines such as
"Value: 12.0" and "Unit: Ounce" take precedence over mentions in sentences; of several mentions, the first counts.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_PACK = r"(?P<number>\d{1,3})"  # longer numbers are usually model numbers
_NUMBER = r"(?P<number>\d{1,5}(?:\.\d{1,4})?)"
# The start and end of a word. The apostrophe is part of a word, so that "Women's" does not contain a size S; \x{2019}
# is the typographic apostrophe.
_START, _END = r"(?:^|[^\pL\pN.'\x{2019}])", r"(?:$|[^\pL\pN'\x{2019}])"
_PACKS = (
    rf"\b(?:pack|packs|set|case|box|lot|bundle|bag|carton)\s+of\s+{_PACK}\b",
    rf"\b{_PACK}\s*-?\s*(?:packs?|pk|ct|counts?|pcs|pieces?|pairs?|bags|bottles|cans|pods|sets)\b",
)
_VALUE, _UNIT = rf"(?m)^\s*value\s*:\s*{_NUMBER}\s*$", r"(?m)^\s*unit\s*:\s*(?P<unit>\S.{0,20}?)\s*$"
# For each kind of quantity: pattern of a unit's names to its size in grams, millilitres or centimetres.
_UNITS: dict[str, dict[str, float]] = {
    "mass": {
        "oz|ounces?": 28.35,
        "lbs?|pounds?": 453.6,
        "kgs?|kilograms?|kilos?": 1000.0,
        "mg|milligrams?": 0.001,
        "g|gr|grams?|gramm": 1.0,
    },
    "volume": {
        r"fl\.?\s*oz|fluid\s+ounces?|fl\.?\s*ounces?": 29.57,
        "ml|millilit(?:er|re)s?": 1.0,
        "l|lit(?:er|re)s?": 1000.0,
        "gal|gallons?": 3785.0,
        "quarts?|qt": 946.4,
        "pints?": 473.2,
    },
    "length": {"inch|inches|″": 2.54, "cm|centimet(?:er|re)s?": 1.0, "mm": 0.1, "ft|feet|foot": 30.48, "yards?": 91.44},
}
_COUNT = "counts?|ct|pieces?|packs?|each"
_SIZE = r"(?:x{0,4}-?small|x{0,5}-?large|medium|[2-6]xl?|[2-6]xs|x{1,5}[sl]|xx+|s|m|l|one\s+size)"
# Matches the last mention of a size, because titles usually end with it.
_LETTERS = rf"(?s)^.*{_START}(?P<size>{_SIZE}){_END}"
_SIZE_NUMBER = rf"\bsize\s*:?\s*{_NUMBER}\b"
NAMES = ("pack", "mass", "volume", "length", "size", "size_number")
DIM = 2 * len(NAMES) + 1  # value and presence of each, and the length of the text


def quantities(texts: pa.Array) -> np.ndarray:
    """[n, DIM] float32: value and presence of each of `NAMES`, and log1p of the number of characters.

    Pack, mass (g), volume (ml) and length (cm) are logarithms. Size is the number of steps from M: -1 for S, 2 for XL.

    >>> found = quantities(pa.array(["Tea, pack of 6\\nValue: 12.0\\nUnit: Fl Oz"], pa.large_string()))[0]
    >>> [round(float(value), 2) for value in found[:6]]
    [1.79, 1.0, 0.0, 0.0, 5.87, 1.0]
    """
    lower = pc.utf8_lower(texts)
    value, unit = _number(lower, _VALUE), pc.struct_field(pc.extract_regex(lower, _UNIT), "unit")
    stated = {"pack": np.where(_is(unit, _COUNT), value, np.nan)}
    packs = [_number(lower, pattern) for pattern in _PACKS]
    found = {"pack": np.log(_first(stated["pack"], *packs))}
    for kind, units in _UNITS.items():
        found[kind] = np.log(_first(_stated(value, unit, units), _mentioned(lower, units)))
    found["size"], found["size_number"] = _size(lower), _number(lower, _SIZE_NUMBER)
    columns = [column for name in NAMES for column in _with_presence(found[name])]
    return np.stack([*columns, np.log1p(pc.utf8_length(texts).to_numpy())], axis=1).astype(np.float32)


def _with_presence(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    there = np.isfinite(values)
    return np.where(there, values, 0.0), there


def _number(texts: pa.Array, pattern: str) -> np.ndarray:
    """[n] the number that the pattern's group `number` matches; NaN if there is no match, or the number is 0."""
    found = pc.struct_field(pc.extract_regex(texts, pattern), "number").cast(pa.float64())
    numbers = found.to_numpy(zero_copy_only=False)
    return np.where(numbers > 0, numbers, np.nan)


def _first(*choices: np.ndarray) -> np.ndarray:
    """[n] for each row, the first of the choices that is not NaN."""
    found = choices[0]
    for choice in choices[1:]:
        found = np.where(np.isnan(found), choice, found)
    return found


def _is(units: pa.Array, names: str) -> np.ndarray:
    """[n] bool: whether the unit matches the pattern of names."""
    matches = pc.match_substring_regex(units, rf"^(?:{names})\.?$").fill_null(False)
    return np.asarray(matches.to_numpy(zero_copy_only=False), bool)


def _stated(value: np.ndarray, unit: pa.Array, units: dict[str, float]) -> np.ndarray:
    """[n] the quantity of the lines "Value:" and "Unit:", in base units; NaN if the unit is not one of these."""
    return _first(*(np.where(_is(unit, names), value * factor, np.nan) for names, factor in units.items()))


def _mentioned(texts: pa.Array, units: dict[str, float]) -> np.ndarray:
    """[n] the first amount in the text, in base units, with the first of these units that the text contains."""
    patterns = {rf"{_START}{_NUMBER}\s*-?\s*(?:{names}){_END}": factor for names, factor in units.items()}
    return _first(*(_number(texts, pattern) * factor for pattern, factor in patterns.items()))


def _size(texts: pa.Array) -> np.ndarray:
    """[n] steps from M to the size that the text mentions last; NaN if there is none, or for "one size"."""
    found = pc.struct_field(pc.extract_regex(texts, _LETTERS), "size")
    known = pc.dictionary_encode(found)
    steps = np.array([_steps(size) for size in known.dictionary.to_pylist()] + [np.nan])
    return np.asarray(steps[known.indices.fill_null(len(steps) - 1).to_numpy(zero_copy_only=False)])


def _steps(size: str) -> float:
    """Steps from M to a size in letters.

    >>> [_steps(size) for size in ("s", "medium", "xl", "xx-large", "3x", "4xl", "xs", "one size")]
    [-1.0, 0.0, 2.0, 3.0, 4.0, 5.0, -2.0, nan]
    """
    if "one" in size:
        return float("nan")
    n_x = int(size[0]) if size[0].isdigit() else size.count("x")
    if size[0].isdigit() and not size.endswith("s"):
        return 1.0 + n_x
    last = size.lstrip("x-0123456789")[:1]
    return {"s": -1.0 - n_x, "m": 0.0, "l": 1.0 + n_x, "": 1.0 + n_x}[last]
