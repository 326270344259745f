"""How the next token is chosen from logits: the largest, or drawn; with transformers' processors in front.

A processor is called as transformers calls it, ``processor(input_ids [n, L] int64, scores [n, V] fp32) -> scores``,
here for one sequence at a time: it sees that sequence's own tokens and no padding. One that leaves few tokens may also
have ``candidates(input_ids, scores) -> Candidates | None``; where it is the last, no scores of all tokens are made.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Candidates:
    """The only tokens that may be drawn.

    Attributes:
        tokens: [n] int64, rising.
        scores: [n] fp32, theirs.
    """

    tokens: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one sequence are chosen.

    Attributes:
        processors: change the scores, in order.
        do_sample: draw from the softmax of the scores; else the largest is taken.
        generator: to draw with; None is torch's own, so ``torch.manual_seed`` holds.
    """

    processors: Sequence[Processor] = ()
    do_sample: bool = False
    generator: torch.Generator | None = None

    @property
    def plain(self) -> bool:
        """Whether the token is just the largest logit."""
        return not self.processors and not self.do_sample

    def process(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Scores [1, V] of logits [1, V] behind the tokens [1, L]."""
        for processor in self.processors:
            logits = processor(input_ids, logits)
        return logits

    def candidates(self, input_ids: Tensor, logits: Tensor) -> Candidates | Tensor:
        """As ``process``; but candidates alone where the last processor knows them."""
        last = self.processors[-1] if self.processors else None
        choose = getattr(last, "candidates", None)
        if choose is None:
            return self.process(input_ids, logits)
        for processor in self.processors[:-1]:
            logits = processor(input_ids, logits)
        few: Candidates | None = choose(input_ids, logits)
        return self.processors[-1](input_ids, logits) if few is None else few


GREEDY = Sampling()


def largest(logits: Tensor) -> list[int]:
    """The first largest of each row of [n, V]."""
    # numpy's argmax over a row is vectorized: several times torch's at the vocabularies of language models.
    return np.argmax(logits.numpy(), axis=1).tolist() if logits.device.type == "cpu" else logits.argmax(1).tolist()


def draw(rows: Sequence[Candidates | Tensor], vocab_size: int, generator: torch.Generator | None) -> list[int]:
    """One token for each row, as transformers draws them together: the same seed gives the same tokens.

    Args:
        rows: candidates, or scores [1, V].
        vocab_size: V.
        generator: to draw with; None is torch's own.

    Raises:
        RuntimeError: the scores of a row are no distribution: NaN, infinite, or nothing left. Nothing is drawn then.
    """
    scores = [row.scores if isinstance(row, Candidates) else row[0] for row in rows]
    weights = [torch.softmax(each, dim=0) for each in scores]
    # A softmax over NaN, over an infinity, or over nothing but -inf has NaN everywhere.
    if not all(len(each) and math.isfinite(float(each[0])) for each in weights):
        raise RuntimeError("these scores give no probability to draw by: NaN, infinite, or no token is left")
    # ``torch.multinomial`` divides each probability by an exponential variate -log(1 - u) and takes the largest. The
    # uniform variates behind them are all drawn, which keeps the sequence of the generator.
    uniform = torch.empty((len(rows), vocab_size), dtype=torch.float64).uniform_(generator=generator)
    return [_drawn(*each) for each in zip(rows, weights, uniform, strict=True)]


def _drawn(row: Candidates | Tensor, weights: Tensor, uniform: Tensor) -> int:
    """The token [V] whose weight over its variate is the largest, the first of equal ones."""
    if isinstance(row, Candidates):
        return int(row.tokens[_race(weights, uniform[row.tokens])])
    # -log(1 - u) >= u: what does not reach the best of the exact ones by weight over u cannot be it.
    bounds = (weights / uniform.float()).numpy()
    first = int(np.nanargmax(bounds))
    best = _times(weights[first : first + 1], uniform[first : first + 1])
    # The bound is rounded: it is taken a little lower.
    tokens = torch.from_numpy(np.flatnonzero(bounds >= 0.999 * float(best)))
    return int(tokens[_race(weights[tokens], uniform[tokens])])


def _race(weights: Tensor, uniform: Tensor) -> int:
    return int(np.argmax(_times(weights, uniform).numpy()))


def _times(weights: Tensor, uniform: Tensor) -> Tensor:
    return weights / -torch.log1p(-uniform).float()
