from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fusion.data.tables import Table
from fusion.errors import DivergedError
from fusion.prediction.predict import warn_of_leak
from fusion.submissions.submission import submission_csv
from fusion.verify import submission as verify_submission


def test_a_submission_is_plain_text_in_the_given_order() -> None:
    content = submission_csv(["b", "007", "a,1"], np.array([0.01, 1e7, 12.34567]))
    assert content == b'sample_id,price\nb,0.0100\n007,10000000.0000\n"a,1",12.3457\n'


@pytest.mark.parametrize(
    ("price", "text"),
    [
        (0.00001234567, "0.0000123457"),
        (0.00999999, "0.00999999"),
        (0.0100001, "0.0100"),
        (1e-30, "0.000000000000000000000000000001"),
        (123456789.12, "123456789.1200"),
        (1e23, "99999999999999991611392.0000"),
    ],
)
def test_prices_of_any_size_are_plain_numbers(price: float, text: str) -> None:
    assert submission_csv(["a"], np.array([price])) == f"sample_id,price\na,{text}\n".encode()
    assert verify_submission._is_price(text)


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan"), float("inf")])
def test_an_invalid_price_is_never_published(price: float) -> None:
    with pytest.raises(DivergedError, match="1 predicted prices are not finite numbers above 0, the first: b"):
        submission_csv(["a", "b"], np.array([1.0, price]))


def test_test_prices_that_are_not_numbers_are_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.DataFrame({"price": ["10", "free", "", "1,200"]}, index=pd.Index(list("abcd")))
    warn_of_leak(Table(frame, np.arange(4)), np.full(4, 10.0), 26.0)
    assert "event=test_prices rows=1 " in capsys.readouterr().err


@pytest.mark.parametrize(("factor", "warned"), [(1.0, False), (1.3, False), (3.0, True)])
def test_warns_if_test_smape_is_far_above_validation_smape(
    factor: float, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = np.full(100, 10.0)
    table = Table(pd.DataFrame({"price": truth}, index=pd.Index([str(i) for i in range(100)])), np.arange(100))
    warn_of_leak(table, truth * factor, 26.0)
    said = capsys.readouterr().err
    assert "event=test_prices" in said
    assert ("event=validation_too_good" in said) == warned
