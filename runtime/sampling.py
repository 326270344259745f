"""How the next token is chosen from logits: the largest, or drawn; with transformers' processors in front.

A processor is called as transformers calls it, ``processor(input_ids [n, L] int64, scores [n, V] fp32) -> scores``,
here for one sequence at a time: it sees that sequence's own tokens and no padding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_FEW = 8  # from here on, places for each candidate, drawing for the candidates alone is faster

Processor = Callable[[Tensor, Tensor], Tensor]


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


GREEDY = Sampling()


def largest(logits: Tensor) -> list[int]:
    """The first largest of each row of [n, V]."""
    # numpy's argmax over a row is vectorized: several times torch's at the vocabularies of language models.
    return np.argmax(logits.numpy(), axis=1).tolist() if logits.device.type == "cpu" else logits.argmax(1).tolist()


def draw(scores: Tensor, generator: torch.Generator | None) -> list[int]:
    """One token for each row of scores [n, V], as transformers draws it: the same seed gives the same tokens.

    Raises:
        RuntimeError: the scores are no distribution: NaN, infinite, or nothing left in a row.
    """
    probabilities = torch.nn.functional.softmax(scores, dim=-1)
    places = (scores > -math.inf).nonzero(as_tuple=True)
    weights = probabilities[places]
    few = scores.device.type == "cpu" and scores.dtype == torch.float32 and _FEW * len(weights) <= scores.numel()
    if not few or len(places[0].unique()) < len(scores) or not bool(weights.isfinite().all()):
        return torch.multinomial(probabilities, num_samples=1, generator=generator).squeeze(1).tolist()
    # ``multinomial`` divides each probability by an exponential variate and takes the largest. Only candidates can be
    # that, so only theirs are computed; the uniform variates behind them are all drawn, which keeps the sequence.
    uniform = torch.empty(scores.shape, dtype=torch.float64).uniform_(generator=generator)
    probabilities[places] = weights / -torch.log1p(-uniform[places]).float()
    return largest(probabilities)
