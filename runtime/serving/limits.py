"""What a request may ask for: checks before anything is queued or computed."""

from collections.abc import Sequence

import numpy as np
import torch

from tilewright.errors import InputError
from tilewright.ir.steps import CachedModel, SourceModel


def checked_prompt(prompt: Sequence[int] | np.ndarray | torch.Tensor, vocab_size: int) -> np.ndarray:
    """A prompt as [n] int64.

    Raises:
        InputError: it is empty, no row of whole numbers, or has an id out of the vocabulary.
    """
    return _checked_ids("prompt", prompt, vocab_size, "begin it with the model's start token if there is no text")


def checked_source(model: CachedModel, source: Sequence[int] | np.ndarray | torch.Tensor | None) -> np.ndarray | None:
    """The source of a request as [n] int64; None for a model that reads none.

    Raises:
        InputError: the model reads sources and there is none, or the reverse; it is longer than the model reads, empty,
            no row of whole numbers, or has an id out of the vocabulary.
    """
    if not isinstance(model, SourceModel):
        if source is not None:
            raise InputError("the model reads no source", why="it is no encoder-decoder", hint="give a prompt alone")
        return None
    if source is None:
        raise InputError("a request needs a source", why="the model is an encoder-decoder", hint="give source=ids")
    ids = _checked_ids("source", source, model.source_vocab_size, "leave out texts without tokens")
    if len(ids) > model.max_source:
        raise InputError(
            "the source is longer than the model reads",
            why=f"it has {len(ids)} tokens, the model reads {model.max_source}",
            hint="shorten it, or split it into several requests",
        )
    return ids


def _checked_ids(what: str, given: Sequence[int] | np.ndarray | torch.Tensor, vocab_size: int, hint: str) -> np.ndarray:
    ids = np.asarray(given)
    if ids.ndim != 1 or ids.size == 0:
        raise InputError(
            f"a {what} has to be a row of at least one token", why=f"it has shape {list(ids.shape)}", hint=hint
        )
    if ids.dtype.kind not in "iu":
        raise InputError(f"a {what} has to be whole numbers, ids of tokens", why=f"it is of type {ids.dtype}")
    ids = ids.astype(np.int64)
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
        raise InputError("a token is not in the vocabulary", why=f"id {wrong}, and the vocabulary has {vocab_size}")
    return ids


def most_tokens(model: CachedModel, pages: int | None, prompt: int, new: int | None, source: int = 0) -> int:
    """Most tokens a request may have, prompt included. The key of its last one is never needed.

    Args:
        model: its context is a limit.
        pages: of the pool, the other limit; None for one that is made to measure.
        prompt: tokens of the prompt.
        new: tokens asked for; None for as many as there may be.
        source: tokens of the source, which takes pages too.

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
    taken = -(-source // size)
    if pages is not None and total - 1 > (pages - taken) * size:
        needed, behind = taken - (-(total - 1) // size), f" behind a source of {source}" if source else ""
        raise InputError(
            "the cache is smaller than this request",
            why=f"{total} tokens{behind} need {needed} pages of {size}, there are {pages}",
            hint="give the engine more pages, shorten the prompt or lower max_new_tokens",
        )
    if new is not None:
        return total
    return model.max_length if pages is None else min(model.max_length, (pages - taken) * size + 1)
