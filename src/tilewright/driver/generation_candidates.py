"""Sampling processors on the few candidates that top-k or top-p leaves, instead of on the whole vocabulary.

Top-p and its relatives sort all scores, which takes longer than a step of a small model once the vocabulary has some
hundred thousand tokens. They treat all tokens alike and a score of -inf as absent, so what they do to the candidates
does not depend on the tokens that were taken out. Only among equal scores may another one stay.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from tilewright.runtime.serving.sampling import Candidates, Processor

_BLOCK = 256
_FIRST = (TopKLogitsWarper, TopPLogitsWarper)
_ALIKE = (
    TemperatureLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
)


class AmongCandidates:
    """Top-k or top-p, and the processors behind it on what it leaves: scores [1, V] to [1, V], -inf elsewhere."""

    def __init__(self, first: TopKLogitsWarper | TopPLogitsWarper, behind: Sequence[Processor]) -> None:
        self._first = first
        self._behind = behind

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As of a processor of transformers, for one sequence."""
        few = self.candidates(input_ids, scores)
        return torch.full_like(scores, -math.inf).index_copy_(1, few.tokens, few.scores[None])

    def candidates(self, input_ids: Tensor, scores: Tensor) -> Candidates:
        """What is left, for one sequence."""
        if isinstance(self._first, TopKLogitsWarper):
            tokens = _places_of_largest(scores, self._first.top_k)
        else:
            tokens = _places_of_nucleus(scores, self._first.top_p, self._first.min_tokens_to_keep)
        tokens = tokens[scores[0, tokens] != -math.inf]  # NaN too: drawing says so
        left = scores[:, tokens]
        for processor in self._behind if len(tokens) else ():
            left = processor(input_ids, left)
        kept = left[0] != -math.inf
        return Candidates(tokens[kept], left[0, kept])


def _places_of_largest(scores: Tensor, count: int) -> Tensor:
    """Places [n], rising, of the ``count`` largest of scores [1, V], and of those equal to the last of them.

    All places where there is a NaN, which ``torch.topk`` takes for the largest.
    """
    row = scores[0].numpy()
    count = min(count, len(row))
    blocks = len(row) // _BLOCK
    if np.isnan(row.max()):
        return torch.arange(len(row))
    if blocks < 2 * count:
        least = np.partition(row, -count)[-count]
        return torch.from_numpy(np.flatnonzero(row >= least))
    # As many numbers as there are blocks with a larger one: the ``count``-th of the blocks' largest is a lower bound.
    heads = row[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
    rough = np.flatnonzero(row >= np.partition(heads, -count)[-count])
    found = row[rough]
    return torch.from_numpy(rough[found >= np.partition(found, -count)[-count]])


def _places_of_nucleus(scores: Tensor, top_p: float, fewest: int) -> Tensor:
    """Places [n], rising, of the largest of scores [1, V] that together have the probability, as transformers counts.

    Its sums run over sorted scores, and so do these; but no places are sorted along, which numpy does much faster.
    """
    row = scores[0].numpy()
    ordered = np.sort(row)
    below = torch.from_numpy(ordered).softmax(0).cumsum(0) <= 1 - top_p
    below[-fewest:] = False
    kept = len(row) - int(below.sum())
    places = np.flatnonzero(row >= ordered[len(row) - kept])
    if len(places) > kept:  # of those equal to the least, the last ones go
        equal = np.flatnonzero(row[places] == row[places].min())
        places = np.delete(places, equal[len(equal) - (len(places) - kept) :])
    return torch.from_numpy(places)


def on_candidates(processors: Sequence[Processor]) -> tuple[Processor, ...]:
    """The same processors; the first top-k or top-p and those behind it that treat all tokens alike become one."""
    for start, processor in enumerate(processors):
        if not isinstance(processor, _FIRST) or type(processor) not in _FIRST or processor.filter_value != -math.inf:
            continue  # a class derived from one of them may do anything
        stop = start + 1
        while stop < len(processors) and type(processors[stop]) in _ALIKE:
            stop += 1
        among = AmongCandidates(processor, processors[start + 1 : stop])
        return (*processors[:start], among, *processors[stop:])
    return tuple(processors)
