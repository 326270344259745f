"""What a request may ask for: checks before anything is queued or computed."""

from collections.abc import Sequence

import numpy as np
import torch

from tilewright.errors import InputError
from tilewright.ir.steps import CachedModel


def checked_prompt(prompt: Sequence[int] | np.ndarray | torch.Tensor, vocab_size: int) -> np.ndarray:
    """A prompt as [n] int64.

    Raises:
        InputError: it is empty, no row of whole numbers, or has an id out of the vocabulary.
    """
    ids = np.asarray(prompt)
    if ids.ndim != 1 or ids.size == 0:
        raise InputError(
            "a prompt has to be a row of at least one token",
            why=f"it has shape {list(ids.shape)}",
            hint="begin it with the model's start token if there is no text",
        )
    if ids.dtype.kind not in "iu":
        raise InputError("a prompt has to be whole numbers, ids of tokens", why=f"it is of type {ids.dtype}")
    ids = ids.astype(np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise InputError("a token is not in the vocabulary", why=f"id {wrong}, and the vocabulary has {vocab_size}")
    return ids


def most_tokens(model: CachedModel, pages: int | None, prompt: int, new: int | None) -> int:
    """Most tokens a request may have, prompt included. The key of its last one is never needed.

    Args:
        model: its context is a limit.
        pages: of the pool, the other limit; None for one that is made to measure.
        prompt: tokens of the prompt.
        new: tokens asked for; None for as many as there may be.

    Raises:
        InputError: ``new`` is below 1, or there is no place for prompt and new tokens.
    """
    if new is not None and new < 1:
        raise InputError("a request has to ask for at least one token", why=f"max_new_tokens is {new}")
    total, size = prompt + (new or 1), model.page_size
    if total > model.max_length:
        raise InputError(
            "the prompt and the new tokens are longer than the model's context",
            why=f"{prompt} tokens and {new or 'at least 1'} new ones, the context has {model.max_length}",
            hint="shorten the prompt or lower max_new_tokens",
        )
    if pages is not None and total - 1 > pages * size:
        raise InputError(
            "the cache is smaller than this request",
            why=f"{total} tokens need {-(-(total - 1) // size)} pages of {size}, there are {pages}",
            hint="give the engine more pages, shorten the prompt or lower max_new_tokens",
        )
    if new is not None:
        return total
    return model.max_length if pages is None else min(model.max_length, pages * size + 1)
