"""TF-IDF vectors and their projection."""

from __future__ import annotations

import numpy as np

from fusion.features import tfidf
from fusion.features.terms import words
from tests.features.texts import texts


def test_a_projection_keeps_the_cosines() -> None:
    generator = np.random.default_rng(0)
    made = [" ".join(f"w{word}" for word in generator.integers(0, 300, 12)) for _ in range(200)]
    space = tfidf.fit("words", texts(made))
    assert space is not None
    exact = tfidf.tfidf(words(texts(made)), space.terms, space.idf).toarray()
    found, present = space.vectors(texts(made))
    assert present.all()
    np.testing.assert_allclose(found @ found.T, exact @ exact.T, atol=5 / tfidf.DIM**0.5)
    assert np.abs(found @ found.T - exact @ exact.T).mean() < 1 / tfidf.DIM**0.5
