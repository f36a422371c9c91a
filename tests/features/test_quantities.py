"""Quantities that are read from texts."""

from __future__ import annotations

import numpy as np
import pytest

from fusion.features import quantities
from tests.features.texts import texts


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("Soda, 6-pack", "pack", np.log(6)),
        ("Set of 3 towels", "pack", np.log(3)),
        ("12 ct", "pack", np.log(12)),
        ("Value: 24.0\nUnit: Count", "pack", np.log(24)),
        ("Coffee 2 lb", "mass", np.log(907.2)),
        ("1.5 kg", "mass", np.log(1500)),
        ("Jerky 3 oz\nValue: 12.0\nUnit: Ounce", "mass", np.log(12 * 28.35)),
        ("Value: 16.9\nUnit: Fl Oz", "volume", np.log(16.9 * 29.57)),
        ("500ml", "volume", np.log(500)),
        ("10 inch pan", "length", np.log(25.4)),
        ("Tee, Large", "size", 1.0),
        ("Medium-weight tee 2XL", "size", 3.0),
        ("Women's tee XS", "size", -2.0),
        ("Dress, Size 8", "size_number", 8.0),
    ],
)
def test_quantities_are_read(text: str, name: str, value: float) -> None:
    position = 2 * quantities.NAMES.index(name)
    found = quantities.quantities(texts([text]))[0]
    assert found[position + 1] == 1
    assert found[position] == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("text", ["Men's tee", "Model 40339PK", "", "Value: 0\nUnit: Count", "Value: 12.0"])
def test_texts_without_quantities(text: str) -> None:
    found = quantities.quantities(texts([text]))[0]
    assert not found[1:-1:2].any()
    assert np.isfinite(found).all()
