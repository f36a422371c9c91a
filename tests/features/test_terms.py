"""Terms of texts: words, pairs, pieces of words and labelled lines."""

from __future__ import annotations

from fusion.features.terms import KINDS, chars, fields, words
from tests.features.texts import found, texts


def n_terms(kind: str, text: str) -> int:
    return len(KINDS[kind](texts([text])).hashes)


def test_words_are_those_of_letters_and_digits_and_their_pairs() -> None:
    assert n_terms("words", "Bar-III  TEE, 2XL") == 4 + 3
    assert n_terms("words", "tee tee") == 1 + 1, "the pair is not the word"
    assert n_terms("words", "") == n_terms("words", " - ") == 0
    assert found(words, "a b") != found(words, "b a")
    assert found(words, "Été") == found(words, "été")


def test_pairs_and_pieces_do_not_cross_rows() -> None:
    several = ["red tea", "", "green"]
    for kind in (words, chars):
        together = kind(texts(several))
        for row, text in enumerate(several):
            assert set(together.hashes[together.counts[[row]].indices].tolist()) == found(kind, text)


def test_pieces_are_runs_within_a_word_with_its_ends() -> None:
    assert n_terms("chars", "tea") == len([" te", "tea", "ea ", " tea", "tea ", " tea "])
    assert n_terms("chars", "a") == len([" a "])


def test_fields_are_short_lines_with_a_label() -> None:
    one, other = "Item: x\nBrand : Bar III ", "brand: bar iii"
    assert found(fields, other) < found(fields, one)
    assert n_terms("fields", f"Description: {'long ' * 20}") == 0
    assert n_terms("fields", "no label") == n_terms("fields", "empty:") == 0


def test_rows_are_counted_once_per_term() -> None:
    terms = words(texts(["tea tea", "tea"]))
    assert sorted(terms.n_rows().tolist()) == [1, 2]
    assert sorted(terms.counts.toarray().max(axis=0).tolist()) == [1, 2]
