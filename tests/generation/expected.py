"""What Hugging Face's own generate makes of a prompt, remembered."""

from typing import Any

import torch

_MADE: dict[tuple[Any, tuple[int, ...], int], list[int]] = {}


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The greedy tokens behind a prompt, without the prompt."""
    key = (model, tuple(prompt), count)
    if key not in _MADE:
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        _MADE[key] = made[0, len(prompt) :].tolist()
    return _MADE[key]


def prompts(*lengths: int, vocab_size: int = 64, seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths."""
    torch.manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,)).tolist() for length in lengths]
