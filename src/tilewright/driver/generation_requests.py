"""The rows of a ``generate`` call as requests to the engine: made, run with a streamer, and put together again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput
from transformers.generation.streamers import BaseStreamer

from tilewright.runtime.serving.engine import Engine
from tilewright.runtime.serving.request import Request


class Submission(BaseStreamer):
    """Given as the streamer of a call whose requests are wanted, and not what they make.

    Attributes:
        requests: of the call.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def put(self, value: Tensor) -> None:
        """The prompt, which the caller knows."""

    def end(self) -> None:
        """Never called: the requests have just begun."""


def run(engine: Engine, requests: Sequence[Request], streamer: BaseStreamer | None, pad: int) -> None:
    """Runs the engine until all requests are finished; if it is left before, all are cancelled.

    Args:
        engine: theirs.
        requests: one a row.
        streamer: is given the rows' tokens [B] column by column, as transformers does, ``pad`` in rows at their end.
        pad: see there.
    """
    sent = 0
    try:
        while not all(request.finished for request in requests):
            engine.progress()
            if streamer is not None:
                sent = _stream(requests, streamer, pad, sent)
        if streamer is not None:
            streamer.end()
        for request in requests:
            request.result()
    finally:
        for request in requests:
            request.cancel()


def _stream(requests: Sequence[Request], streamer: BaseStreamer, pad: int, sent: int) -> int:
    """Gives the streamer the columns that all unfinished rows have reached; returns how many it has by now."""
    reached = min((each.made for each in requests if not each.finished), default=max(each.made for each in requests))
    for column in range(sent, reached):
        tokens = [each.tokens[each.prompt_length + column] if column < each.made else pad for each in requests]
        streamer.put(torch.tensor(tokens))
    return max(sent, reached)


def output(
    input_ids: Tensor, requests: Sequence[Request], config: GenerationConfig, pad: int
) -> GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput | Tensor:
    """What transformers returns: prompts and new tokens, shorter rows padded; scores and logits where asked for.

    Where a row has ended its scores and logits are 0.
    """
    made = [torch.tensor(request.new_tokens, dtype=torch.int64) for request in requests]
    padded = torch.nn.utils.rnn.pad_sequence(made, batch_first=True, padding_value=pad)
    sequences = torch.cat([input_ids, padded], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    columns: dict[str, Any] = {"sequences": sequences}
    if config.output_scores:
        columns["scores"] = _columns([request.scores for request in requests])
    if config.output_logits:
        columns["logits"] = _columns([request.logits for request in requests])
    kind = GenerateDecoderOnlyOutput if requests[0].source is None else GenerateEncoderDecoderOutput
    return kind(**columns)


def _columns(rows: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """[B, V] for each column, from each row's [V] for its columns."""
    nothing = torch.zeros_like(rows[0][0])
    longest = max(map(len, rows))
    return tuple(torch.stack([row[i] if i < len(row) else nothing for row in rows]) for i in range(longest))
