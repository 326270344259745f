"""Sampling processors on the few candidates that top-k leaves, instead of on the whole vocabulary.

Top-p and its relatives sort all scores, which takes longer than a step of a small model once the vocabulary has some
hundred thousand tokens. They treat all tokens alike and a score of -inf as absent, so what they do to the candidates
does not depend on the tokens that top-k has taken out. Only among equal scores may another one stay.
"""

import math
from collections.abc import Sequence

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

from tilewright.runtime.sampling import Processor

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
    """Top-k, and the processors behind it on what it leaves: scores [1, V] to scores [1, V], -inf elsewhere."""

    def __init__(self, top_k: TopKLogitsWarper, behind: Sequence[Processor]) -> None:
        self._top_k = top_k
        self._behind = behind

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As of a processor of transformers, for one sequence."""
        scores = self._top_k(input_ids, scores)
        candidates = (scores[0] != -math.inf).nonzero().squeeze(1)  # NaN too: drawing says so
        if len(candidates) == 0:
            return scores
        left = scores[:, candidates]
        for processor in self._behind:
            left = processor(input_ids, left)
        return torch.full_like(scores, -math.inf).index_copy_(1, candidates, left)


def on_candidates(processors: Sequence[Processor]) -> tuple[Processor, ...]:
    """The same processors; a top-k and those behind it that treat all tokens alike become one."""
    for start, processor in enumerate(processors):
        if type(processor) is not TopKLogitsWarper or processor.filter_value != -math.inf:
            continue
        stop = start + 1
        while stop < len(processors) and type(processors[stop]) in _ALIKE:
            stop += 1
        if stop > start + 1:
            among = AmongCandidates(processor, processors[start + 1 : stop])
            return (*processors[:start], among, *processors[stop:])
    return tuple(processors)
