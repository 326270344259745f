"""Weights as kernels want them: laid out once when a program is loaded.

Layouts: "as_is"; "kn", a matrix [N, K] as [K, N]; "panels:P", as [ceil(N/P), K, P] with zeros after column N, so that
a kernel that computes P columns reads one contiguous panel; "panels:P:G", as [ceil(N/P), K/G, P, G], for processors
that sum the products of G neighbours along K in one step; "vendor", as the vendor library packs it. Panels of several
matrices [.., N, K] lie one matrix after another. "blocks:F:P", rows of bytes in block format F in panels of P rows, as
in ``tilewright.ops.block_panels``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tilewright.errors import TilewrightError
from tilewright.ir.program import Weight
from tilewright.ops.block_panels import has_panels, panel_bytes, to_panels
from tilewright.runtime.pages import empty_bytes

ALIGNMENT = 16
"""Bytes; the widest alignment that kernels are told of. A parameter mapped from a file may be aligned to less."""


@dataclass(frozen=True)
class PackedLinear:
    """A linear layer's weight in the vendor library's own form.

    Attributes:
        weight: opaque; only ``apply`` reads it.
        op: the library's linear, looked up once: a look-up by name costs as much as a small kernel.
    """

    weight: Tensor
    op: Callable[..., Tensor]

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: x [M, K] -> a fresh [M, N].

        oneDNN's op has no form that writes into existing memory.
        """
        return self.op(x, self.weight, bias, "none", [], "")


LoadedWeight = Tensor | PackedLinear


def load_weights(weights: Mapping[str, Weight]) -> dict[str, LoadedWeight]:
    """Lays out all weights of a program. Weights that share storage (tied weights) are laid out once.

    Raises:
        TilewrightError: a layout is unknown or does not fit its weight.
    """
    made: dict[tuple[object, ...], LoadedWeight] = {}
    loaded: dict[str, LoadedWeight] = {}
    for key, weight in weights.items():
        tensor = weight.tensor.detach()
        same = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), weight.layout)
        if same not in made:
            made[same] = lay_out(tensor, weight.layout, key)
        loaded[key] = made[same]
    return loaded


def lay_out(tensor: Tensor, layout: str, name: str = "") -> LoadedWeight:
    """One weight in a layout; contiguous and aligned to 16 bytes. "as_is" shares the memory where it can.

    Args:
        tensor: any shape for "as_is", [.., N, K] for panels, [N, K] otherwise.
        layout: see the module.
        name: for errors.

    Raises:
        TilewrightError: the layout is unknown or does not fit the weight.
    """
    kind, _, form = layout.partition(":")
    width, _, group = form.partition(":")
    if kind == "as_is" and not width:
        tensor = tensor.contiguous()
        return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
    if tensor.dim() == 2 and kind == "kn" and not width:
        return tensor.t().contiguous()
    if tensor.dim() >= 2 and kind == "panels" and width.isdigit() and int(width) > 0:
        if not group:
            return _panels(tensor, int(width), 1).squeeze(-1)
        if group.isdigit() and int(group) > 0 and tensor.shape[-1] % int(group) == 0:
            return _panels(tensor, int(width), int(group))
    if tensor.dim() >= 2 and kind == "blocks" and has_panels(width) and group.isdigit():
        return _block_panels(tensor, width, int(group))
    if tensor.dim() == 2 and kind == "vendor" and not width:
        return _pack(tensor) if vendor_packs(tensor.dtype) else lay_out(tensor, "as_is", name)
    raise TilewrightError(
        f"a weight cannot be laid out as '{layout}'",
        where=f"weight '{name}'",
        why=f"its shape is {tuple(tensor.shape)}",
        hint="layouts are as_is and, for matrices, kn, panels:<n>, panels:<n>:<divisor of k>, vendor, and "
        "blocks:<format>:<n> for bytes",
    )


def _pack(tensor: Tensor) -> PackedLinear:
    # torch builds without oneDNN have no such ops, so they are looked up when they are needed.
    ops = torch.ops.mkldnn
    return PackedLinear(ops._reorder_linear_weight.default(tensor), ops._linear_pointwise.default)


def _block_panels(tensor: Tensor, form: str, width: int) -> Tensor:
    """Rows of bytes [.., N, bytes] in panels of ``width`` rows, in large pages."""
    *outer, n, row = tensor.shape
    panels = panel_bytes(form, (n, row), width)
    laid_out = empty_bytes(math.prod(outer) * math.prod(panels)).view(-1, *panels)
    for matrix, out in zip(tensor.reshape(-1, n, row), laid_out, strict=True):
        to_panels(form, matrix, width, out)
    return laid_out.view(*outer, *panels)


def _panels(tensor: Tensor, width: int, group: int) -> Tensor:
    """[.., N, K] as [.., ceil(N / width), K / group, width, group], in large pages."""
    *outer, n, k = tensor.shape
    full, rest = divmod(n, width)
    shape = (*outer, full + (rest > 0), k // group, width, group)
    panels = empty_bytes(math.prod(shape) * tensor.element_size()).view(tensor.dtype).view(shape)
    groups = tensor.unflatten(-1, (k // group, group))
    panels[..., :full, :, :, :] = groups[..., : full * width, :, :].unflatten(-3, (full, width)).transpose(-3, -2)
    if rest:
        panels[..., full, :, :rest, :] = groups[..., full * width :, :, :].transpose(-3, -2)
        panels[..., full, :, rest:, :] = 0
    return panels


def vendor_packs(dtype: torch.dtype) -> bool:
    """Whether the vendor library has packed linear layers for this dtype on this machine.

    Measured on one thread of a Zen 4, fp32: from 4 rows up oneDNN with a packed weight takes 0.57 to 0.97 of the time
    of ``torch.addmm(out=)`` for most shapes.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if dtype == torch.float32:
        return True
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """``out = x @ weight.T + bias`` in place: x [M, K], plain weight [N, K], bias [N] or none, out [M, N]."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
