"""Random numbers of a step: their distribution, and that ranks draw those of their own rows."""

from __future__ import annotations

import pytest
import torch

from fusion.nn.draws import CountedWords, DrawnWords, kept, normal, random_rows, words_from

CPU = torch.device("cpu")


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.25, 0.5, 0.999])
def test_a_mask_hides_the_given_share(dropout: float) -> None:
    with random_rows(7, slice(0, 1000), 1000, CPU):
        mask = kept(torch.empty(1000, 301), dropout)
    assert mask.dtype == torch.bool and mask.shape == (1000, 301)
    assert abs(1 - mask.float().mean().item() - dropout) < 0.004
    assert (mask.float().mean(0) - mask.float().mean()).abs().max() < 0.08  # no column is hidden more often


def test_noise_is_standard_normal() -> None:
    with random_rows(7, slice(0, 1000), 1000, CPU):
        noise = normal(torch.empty(1000, 33, 7))
    assert noise.shape == (1000, 33, 7) and noise.dtype == torch.float32
    assert abs(noise.mean().item()) < 0.01 and abs(noise.std().item() - 1) < 0.01
    assert abs((noise.abs() > 1.96).float().mean().item() - 0.05) < 0.003
    assert 4 < noise.abs().max().item() < 4.4  # the outermost of 2^16 quantiles is 4.3


def test_two_draws_of_a_step_differ_and_steps_differ() -> None:
    def two(seed: int) -> list[bytes]:
        with random_rows(seed, slice(0, 50), 50, CPU):
            return [normal(torch.empty(50, 4)).numpy().tobytes() for _ in range(2)]

    assert len({*two(1), *two(2)}) == 4 and two(1) == two(1)


@pytest.mark.parametrize("words", [CountedWords, DrawnWords])
def test_ranks_draw_the_numbers_of_their_own_rows(words: type[CountedWords | DrawnWords]) -> None:
    def drawn(rows: slice) -> torch.Tensor:
        if words is CountedWords:
            source: CountedWords | DrawnWords = CountedWords(3, rows, 10)
        else:
            source = DrawnWords(torch.Generator().manual_seed(3), rows, 10, CPU)
        like = torch.empty(rows.stop - rows.start, 5)
        with words_from(source):
            return torch.cat([normal(like), kept(like, 0.3).float(), normal(like)], dim=1)

    together = drawn(slice(0, 10))
    assert torch.equal(torch.cat([drawn(slice(0, 3)), drawn(slice(3, 4)), drawn(slice(4, 10))]), together)
