"""Padded batches of prompts: to rows of their own tokens, and back to the shape that the caller knows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moved:
    """A batch whose masked places have been moved to the left, where transformers expects them.

    Attributes:
        ids, mask: [B, S], moved.
        original: [B, S], the ids as they were given.
    """

    ids: Tensor
    mask: Tensor
    original: Tensor

    def restore(self, result: Any) -> Any:
        """The result of ``generate`` with prompts as they were given in front of the new tokens."""
        sequences = result if isinstance(result, Tensor) else result.sequences
        copies = sequences.shape[0] // self.original.shape[0]
        prompts = self.original.repeat_interleave(copies, dim=0)
        sequences = torch.cat([prompts, sequences[:, prompts.shape[1] :]], dim=1)
        if isinstance(result, Tensor):
            return sequences
        result.sequences = sequences
        return result


@dataclass(frozen=True)
class Text:
    """One row of a call.

    Attributes:
        prompt: [n] ids that stand in front of the new tokens.
        source: [m] ids that they are written behind, for a model that reads sources.
    """

    prompt: Tensor
    source: Tensor | None = None

    def pages(self, page_size: int, new: int) -> int:
        """Most pages it takes with so many new tokens."""
        read = 0 if self.source is None else -(-len(self.source) // page_size)
        return read - (-(len(self.prompt) + new) // page_size)


def pads_to_the_left(ids: Tensor | None, mask: Tensor | None) -> Moved | None:
    """The batch with masked places moved to the left; None if there is nothing to move."""
    if ids is None or mask is None:
        return None
    valid = mask != 0
    if not bool((valid[:, :-1] & ~valid[:, 1:]).any()):
        return None
    order = valid.long().sort(dim=1, stable=True).indices
    return Moved(ids.gather(1, order), mask.gather(1, order), ids)


def own_tokens(ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The tokens of each row [B, S] that are not masked."""
    return list(ids) if mask is None else [row[valid] for row, valid in zip(ids, mask != 0, strict=True)]
