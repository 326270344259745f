"""Drawing for candidates alone gives the tokens of ``torch.multinomial``, and leaves the generator where that does."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tilewright.runtime.serving.sampling import Candidates, draw


def _candidates(scores: torch.Tensor) -> Candidates:
    (tokens,) = (scores[0] > -math.inf).nonzero(as_tuple=True)
    return Candidates(tokens, scores[0, tokens])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kept", [1, 5, 40, 400])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_draws_equal_those_of_multinomial(rows: int, kept: int, spread: float) -> None:
    drawn = set()
    for seed in range(40):
        generators = [torch.Generator().manual_seed(seed) for _ in range(3)]
        scores = torch.randn(rows, 400, generator=torch.Generator().manual_seed(seed)) * spread
        places = torch.rand(rows, 400, generator=torch.Generator().manual_seed(seed))
        scores[places < places.sort(descending=True).values[:, kept - 1 : kept]] = -math.inf
        expected = torch.multinomial(scores.softmax(1), 1, generator=generators[0]).squeeze(1).tolist()
        assert draw(scores.split(1), 400, generators[1]) == expected
        assert draw([_candidates(row) for row in scores.split(1)], 400, generators[2]) == expected
        for generator in generators[1:]:
            assert torch.equal(generators[0].get_state(), generator.get_state())
        drawn.add(tuple(expected))
    assert len(drawn) > 1


def test_torchs_own_generator_is_the_default() -> None:
    scores = torch.full((2, 100), -math.inf)
    scores[:, 10:15] = 0
    torch.manual_seed(3)
    expected = [torch.multinomial(scores.softmax(1), 1).squeeze(1).tolist() for _ in range(5)]
    torch.manual_seed(3)
    assert [draw([scores[:1], _candidates(scores[1:])], 100, None) for _ in range(5)] == expected


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", [lambda row: row, _candidates], ids=["scores", "candidates"])
def test_scores_that_are_no_distribution(wrong: float, form: Callable[[torch.Tensor], Any]) -> None:
    scores = torch.full((2, 100), -math.inf)
    scores[0, 3] = 1.0
    scores[1, 4] = wrong
    few = Candidates(torch.tensor([4]), torch.tensor([wrong]))
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="probability"):
        draw([form(scores[:1]), few if form is _candidates else scores[1:]], 100, None)
    assert torch.equal(torch.get_rng_state(), before)
