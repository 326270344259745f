"""Collects the values and weights of a program while its steps are emitted."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tilewright.errors import CodegenError
from tilewright.ir.program import Storage, Value, View, Weight
from tilewright.ir.sizes import Size, ceil_div, contiguous_strides
from tilewright.ops.block_panels import has_panels, panel_bytes


def laid_out_shape(shape: tuple[Size, ...], layout: str) -> tuple[Size, ...]:
    """Shape of a weight [N, K] after a load-time layout (names: ``tilewright.ir.program.Weight``).

    Returns:
        "as_is" and "vendor": unchanged (the vendor's own form is opaque); "kn": [K, N]; "panels:P": [ceil(N/P), K, P];
        "panels:P:G": [ceil(N/P), K/G, P, G]; "blocks:F:P" of bytes in format F: as of ``panel_bytes``.
        Panels of a weight [.., N, K] have its outer axes in front.

    Raises:
        CodegenError: the layout is unknown, or the weight is not a matrix, nor matrices in panels.
    """
    name, _, form = layout.partition(":")
    width, _, group = form.partition(":")
    if name in ("as_is", "vendor") and not width:
        return shape
    if len(shape) == 2 and name == "kn" and not width:
        return (shape[1], shape[0])
    if len(shape) >= 2 and name == "blocks" and has_panels(width) and group.isdigit():
        return (*shape[:-2], *panel_bytes(width, (int(shape[-2]), int(shape[-1])), int(group)))
    if len(shape) >= 2 and name == "panels" and width.isdigit() and int(width) > 0:
        *outer, n, k = shape
        count = ceil_div(n, int(width))
        if not group:
            return (*outer, count, k, int(width))
        if group.isdigit() and int(group) > 0 and isinstance(k, int) and k % int(group) == 0:
            return (*outer, count, k // int(group), int(width), int(group))
    raise CodegenError(
        f"no layout '{layout}' for a weight of shape {shape}",
        hint="as_is, kn, panels:<n>, panels:<n>:<divisor of k>, blocks:<format>:<n> or vendor",
    )


class ProgramBuilder:
    """Values and weights of one program; each emitter adds what it needs.

    A value's index is its position in ``values``. Names are made unique by a suffix.

    Args:
        interleaved: how many neighbours along K lie together in the weights of a product, by element type; for
            processors that sum their products in one step. 1 where it is not said.
    """

    def __init__(self, interleaved: Mapping[torch.dtype, int] | None = None) -> None:
        self.interleaved = dict(interleaved or {})
        self.values: list[Value] = []
        self.weights: dict[str, Weight] = {}
        self._names: set[str] = set()
        self._layouts: dict[tuple[str, str], int] = {}
        self._origin_key: dict[int, str] = {}

    def new_value(
        self,
        name: str,
        storage: Storage,
        dtype: torch.dtype,
        shape: tuple[Size, ...],
        source: int | str | None = None,
        state: bool = False,
    ) -> int:
        """Adds a value (see ``tilewright.ir.program.Value``) and returns its index."""
        unique, count = name, 1
        while unique in self._names:
            count += 1
            unique = f"{name}_{count}"
        self._names.add(unique)
        index = len(self.values)
        self.values.append(Value(index, unique, storage, dtype, tuple(shape), source, state))
        return index

    def new_weight(self, key: str, tensor: Tensor) -> int:
        """Adds a weight as it is, or returns the value already made for ``key``."""
        known = self._layouts.get((key, "as_is"))
        if known is not None:
            return known
        index = self._new_weight_value(key, Weight(tensor), tuple(tensor.shape))
        self._layouts[(key, "as_is")] = index
        self._origin_key[index] = key
        return index

    def _new_weight_value(self, name: str, weight: Weight, shape: tuple[Size, ...]) -> int:
        index = self.new_value(name, Storage.WEIGHT, weight.tensor.dtype, shape)
        unique = self.values[index].name
        self.values[index] = replace(self.values[index], source=unique)
        self.weights[unique] = weight
        return index

    def weight_layout(self, value_index: int, layout: str) -> int:
        """The same weight with another load-time layout; one value for each (weight, layout).

        Raises:
            CodegenError: the value is not a weight, or the layout does not fit it.
        """
        if value_index not in self._origin_key:
            raise CodegenError(
                "only a weight can be laid out at load time", where=f"value '{self.values[value_index].name}'"
            )
        key = self._origin_key[value_index]
        known = self._layouts.get((key, layout))
        if known is not None:
            return known
        tensor = self.weights[self.values[value_index].name].tensor
        shape = laid_out_shape(tuple(tensor.shape), layout)
        index = self._new_weight_value(f"{key}:{layout}", Weight(tensor, layout), shape)
        self._layouts[(key, layout)] = index
        self._origin_key[index] = key
        return index

    def checkpoint(self) -> int:
        """A mark for ``rollback``."""
        return len(self.values)

    def rollback(self, mark: int) -> None:
        """Forgets the values added since ``mark``; for a region whose emission failed half-way."""
        for value in self.values[mark:]:
            self._names.discard(value.name)
            self._origin_key.pop(value.index, None)
            self.weights.pop(value.name, None)
        self._layouts = {key: index for key, index in self._layouts.items() if index < mark}
        del self.values[mark:]

    def scratch(self, name: str, dtype: torch.dtype, shape: tuple[Size, ...]) -> View:
        """A new contiguous value in the arena, as a view of all of it."""
        return self.whole(self.new_value(name, Storage.ARENA, dtype, shape))

    def whole(self, value_index: int) -> View:
        """All of a value, as a contiguous view."""
        shape = self.values[value_index].shape
        return View(value_index, shape, contiguous_strides(shape))

    def dtype(self, view: View | int) -> torch.dtype:
        """Element type of a value or of the value a view looks into."""
        return self.values[view.value if isinstance(view, View) else view].dtype

    def is_weight(self, value_index: int) -> bool:
        """Whether the value is a weight, so that its layout can be chosen at load time."""
        return self.values[value_index].storage is Storage.WEIGHT
