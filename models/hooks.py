"""Attention hooks of transformers: a model under capture emits one ``tilewright::attention`` per attention.

``AttentionInterface`` and ``AttentionMaskInterface`` are transformers' own extension points. The mask hook hands the
raw [B, S] padding mask through and remembers which slots its pattern lets attend (full, causal, window); the
attention hook turns both into operands. A pattern it does not know is built in full by transformers and becomes a
bias, so it is never guessed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, masking_utils
from transformers.masking_utils import AttentionMaskInterface

from tilewright import ops as ops  # registers tilewright::attention
from tilewright.errors import CaptureError
from tilewright.models.config_fields import replaced_field

NAME = "tilewright"
_CONFIG_FIELD = "_attn_implementation_internal"


@dataclass(frozen=True)
class Pattern:
    """Which key slots a query slot may see, by position alone; -1: no limit. Fields as in ``tilewright::attention``."""

    causal: bool = False
    window_left: int = -1
    window_right: int = -1

    def __and__(self, other: "Pattern") -> "Pattern":
        return Pattern(
            self.causal or other.causal,
            _tighter(self.window_left, other.window_left),
            _tighter(self.window_right, other.window_right),
        )


def _tighter(a: int, b: int) -> int:
    return max(a, b) if min(a, b) < 0 else min(a, b)


@dataclass
class _Masks:
    """Masks made during one capture. The tensors are kept, so that no id is used again."""

    patterns: dict[int, tuple[Tensor, Pattern]] = field(default_factory=dict)


_active: list[_Masks] = []


def pattern_of(mask_function: Callable[..., Any]) -> Pattern | None:
    """The pattern a mask function of transformers stands for, or None when it is not one of the known ones.

    transformers composes closures: ``and_masks(sliding_window_overlay(w), causal_mask_function)``. A closure is known
    by the code it was made from, and its window by the variable it closed over.
    """
    if mask_function is masking_utils.causal_mask_function:
        return Pattern(causal=True)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Pattern()
    code = getattr(mask_function, "__code__", None)
    if code is None:
        return None
    closed = dict(zip(code.co_freevars, (cell.cell_contents for cell in mask_function.__closure__ or ()), strict=True))
    if code is _AND_CODE:
        result: Pattern | None = Pattern()
        for part in closed["mask_functions"]:
            inner = pattern_of(part)
            result = result & inner if result is not None and inner is not None else None
        return result
    window = closed.get("sliding_window")
    if not isinstance(window, int):
        return None
    if code is _WINDOW_CODE:
        return Pattern(window_left=window - 1)  # key > query - window
    if code is _BIDIRECTIONAL_WINDOW_CODE:
        return Pattern(window_left=window, window_right=window)  # |query - key| <= window
    return None


def _code(function: Callable[..., Any]) -> CodeType:
    return cast(FunctionType, function).__code__


_AND_CODE = _code(masking_utils.and_masks(masking_utils.causal_mask_function))
_WINDOW_CODE = _code(masking_utils.sliding_window_overlay(1))
_BIDIRECTIONAL_WINDOW_CODE = _code(masking_utils.sliding_window_bidirectional_overlay(1))


def make_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The mask hook: [B, Sk] key validity (bool) where the pattern is known, else the full [B, 1, S, Sk] mask (bool).

    A mask is always returned, also when no token is padding: skipping it would depend on the values of the mask.
    """
    pattern = pattern_of(mask_function)
    plain = isinstance(q_offset, int) and isinstance(kv_offset, int) and q_offset == 0 and kv_offset == 0
    if pattern is None or not plain or not _active:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        full = masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
        assert full is not None  # skipping was switched off
        return full
    if attention_mask is None:
        valid = torch.ones((batch_size, kv_length), dtype=torch.bool, device=kwargs.get("device"))
    else:
        # A tensor of its own, because one padding mask can serve several patterns.
        valid = attention_mask.view(attention_mask.shape)
    _active[-1].patterns[id(valid)] = (valid, pattern)
    return valid


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention hook; arguments as transformers passes them to every attention function.

    Args:
        query: [B, Hq, S, D]. key: [B, Hkv, Sk, D]. value: [B, Hkv, Sk, Dv].
        attention_mask: what ``make_mask`` returned, a full mask (bool: may attend; float: added), or None.
        scaling: factor of the scores; None for D ** -0.5.
        is_causal: overrides the module's own flag; as in transformers it counts only where no mask is given.
        position_bias: added to the scaled scores. softcap: see ``tilewright::attention``. s_aux: [Hq] sinks.

    Returns:
        ([B, S, Hq, Dv], None)

    Raises:
        CaptureError: dropout is asked for, or keys and values come from a paged cache.
    """
    if dropout or kwargs.get("cache") is not None:
        raise CaptureError(
            "attention with dropout or a paged cache cannot be captured",
            where=type(module).__name__,
            hint="call model.eval(), and leave the cache to the compiled model",
        )
    pattern, valid, bias = Pattern(), None, None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        pattern = Pattern(causal=bool(causal))
    elif _active and id(attention_mask) in _active[-1].patterns:
        valid, pattern = _active[-1].patterns[id(attention_mask)]
    elif attention_mask.dtype == torch.bool:
        bias = torch.where(attention_mask, 0.0, float("-inf")).to(query.dtype)
    else:
        bias = attention_mask
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    out = torch.ops.tilewright.attention(
        query,
        key,
        value,
        valid,
        bias,
        s_aux,
        float(scaling if scaling is not None else query.shape[-1] ** -0.5),
        pattern.causal,
        pattern.window_left,
        pattern.window_right,
        float(softcap or 0.0),
    )
    return out, None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, make_mask)


@contextmanager
def attention_implementation(model: nn.Module, name: str = NAME) -> Iterator[None]:
    """Sets the attention implementation of all configurations of ``model``, and restores each exactly.

    Args:
        model: a transformers model; only the field that names the implementation is touched.
        name: "tilewright", or one of transformers' own ("sdpa", "eager").
    """
    _active.append(_Masks())
    try:
        with replaced_field(model, _CONFIG_FIELD, name):
            yield
    finally:
        _active.pop()
