"""Drawing for candidates alone gives the tokens of ``torch.multinomial``, and leaves the generator where that does."""

import math

import pytest
import torch

from tilewright.runtime.sampling import draw


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("candidates", [1, 5, 40, 400])
def test_draws_equal_those_of_multinomial(rows: int, candidates: int) -> None:
    drawn = set()
    for seed in range(40):
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        scores = torch.randn(rows, 400, generator=torch.Generator().manual_seed(seed))
        scores[scores < scores.sort(descending=True).values[:, candidates - 1 : candidates]] = -math.inf
        expected = torch.multinomial(scores.softmax(1), 1, generator=generators[0]).squeeze(1).tolist()
        assert draw(scores, generators[1]) == expected
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
        drawn.add(tuple(expected))
    assert len(drawn) > 1


def test_torchs_own_generator_is_the_default() -> None:
    scores = torch.full((2, 100), -math.inf)
    scores[:, 10:15] = 0
    torch.manual_seed(3)
    expected = [torch.multinomial(scores.softmax(1), 1).squeeze(1).tolist() for _ in range(5)]
    torch.manual_seed(3)
    assert [draw(scores, None) for _ in range(5)] == expected


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_distribution(wrong: float) -> None:
    scores = torch.full((2, 100), -math.inf)
    scores[0, 3] = 1.0
    scores[1, 4] = wrong
    with pytest.raises(RuntimeError, match="probability"):
        draw(scores, None)
