"""The public functions that users import, with their signatures."""

from __future__ import annotations

import pytest

import fusion
from fusion.utils import (
    compute_metrics,
    compute_smape,
)


def test_the_package_exports_what_it_names() -> None:
    for name in fusion.__all__:
        assert getattr(fusion, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fusion.nothing  # noqa: B018


def test_metrics_equal_those_of_the_package() -> None:
    assert compute_smape([1], [3]) == pytest.approx(100.0)
    assert set(compute_metrics([1, 2], [2, 2])) == {"smape", "mae", "rmse", "mape", "r2"}
