"""Gives requests their next tokens out of a step's logits, and says which of them end with it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tilewright.runtime.serving.request import Request
from tilewright.runtime.serving.sampling import Candidates, draw, largest


@dataclass(frozen=True)
class Turn:
    """A request whose next token is chosen.

    Attributes:
        request: whose.
        row: of the logits it is chosen from.
        drafts: proposals; draft i was fed behind them, so row + i + 1 holds if draft i is what is chosen at row + i.
        shared: whether another request chooses from the same row.
    """

    request: Request
    row: int
    drafts: Sequence[int] = field(default=())
    shared: bool = False


def choose(turns: Sequence[Turn], logits: Tensor) -> list[str | None]:
    """Appends to each request its next token, and those behind it as long as proposals hold.

    What a processor or stopping criterion of a request raises ends that request only.

    Args:
        turns: whose turn it is.
        logits: [R, V] fp32.

    Returns:
        For each turn why its request ends, or None.
    """
    best = largest(logits) if any(turn.request.options.sampling.plain for turn in turns) else [-1] * len(logits)
    first = _first_tokens(turns, logits, best)
    return [_take(turn, token, logits, best) for turn, token in zip(turns, first, strict=True)]


def _take(turn: Turn, token: int | Exception, logits: Tensor, best: Sequence[int]) -> str | None:
    request = turn.request
    for index in range(len(turn.drafts) + 1):
        if index:
            token = _one_token(request, logits, best, turn.row + index)
        if isinstance(token, Exception):
            request.error = token
            return "error"
        request.append(token)
        reason = request.end_reason()
        if reason is not None or index == len(turn.drafts) or token != turn.drafts[index]:
            return reason
    return None


def _first_tokens(turns: Sequence[Turn], logits: Tensor, best: Sequence[int]) -> list[int | Exception]:
    """A token for each turn; those that are drawn with one generator are drawn together, as transformers does."""
    tokens: list[int | Exception] = [best[turn.row] for turn in turns]
    drawn: dict[torch.Generator | None, list[tuple[int, Candidates | Tensor]]] = {}
    for index, turn in enumerate(turns):
        options = turn.request.options
        if options.sampling.plain and not (options.keep_logits or options.keep_scores):
            continue
        try:
            scores = _scores(turn.request, logits[turn.row : turn.row + 1], turn.shared)
        except Exception as error:
            tokens[index] = error
            continue
        if options.sampling.do_sample:
            drawn.setdefault(options.sampling.generator, []).append((index, scores))
        else:
            assert isinstance(scores, Tensor)
            tokens[index] = largest(scores)[0]
    for generator, group in drawn.items():
        made = _draw([scores for _, scores in group], logits.shape[1], generator)
        for (index, _), token in zip(group, made, strict=True):
            tokens[index] = token
    return tokens


def _draw(
    rows: Sequence[Candidates | Tensor], vocab_size: int, generator: torch.Generator | None
) -> Sequence[int | Exception]:
    """One token for each row; scores that are no distribution (NaN, nothing left) are an error of their own."""
    try:
        return draw(rows, vocab_size, generator)
    except RuntimeError as error:
        return [error] if len(rows) == 1 else [_draw([each], vocab_size, generator)[0] for each in rows]


def _one_token(request: Request, logits: Tensor, best: Sequence[int], row: int) -> int | Exception:
    options = request.options
    if options.sampling.plain and not (options.keep_logits or options.keep_scores):
        return best[row]
    try:
        scores = _scores(request, logits[row : row + 1], shared=False)
        if options.sampling.do_sample:
            return draw([scores], logits.shape[1], options.sampling.generator)[0]
        assert isinstance(scores, Tensor)
        return largest(scores)[0]
    except Exception as error:
        return error


def _scores(request: Request, logits: Tensor, shared: bool) -> Candidates | Tensor:
    """Scores [1, V] of logits [1, V], both recorded if the request keeps them; processors may work in place.

    Where nobody keeps them, candidates are enough to draw among. They are recorded in the place of the next token: an
    interruption may have left others there.
    """
    options, place = request.options, request.made
    if options.keep_logits:
        request.logits[place:] = [logits[0].clone()]
    given = logits.clone() if shared else logits
    if options.sampling.do_sample and not options.keep_scores:
        return options.sampling.candidates(request.input_ids, given)
    scores = options.sampling.process(request.input_ids, given)
    if options.keep_scores:
        request.scores[place:] = [scores[0].clone()]
    return scores
