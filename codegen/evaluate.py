"""Evaluates nodes of a region lazily: the value of a node at an index, as statements of a kernel.

Views become arithmetic on the index, inputs become loads, pointwise ops become expressions in the compute dtype.
Nothing is computed that no output asks for, and what two users ask for at the same index is computed once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.codegen import reductions, views
from tilewright.codegen.index import Index, constant, linear, variable, without_ones
from tilewright.codegen.nodes import arguments, compute_dtype, literal, op_name, role, size_of
from tilewright.codegen.writer import TL_TYPES, KernelWriter, Register
from tilewright.errors import CodegenError
from tilewright.ir.facts import TensorType, fact, find_fact, where
from tilewright.ir.program import View
from tilewright.ir.sizes import Size
from tilewright.ops import Flow, traits_of
from tilewright.ops.block_linear import BLOCK_EMBEDDING
from tilewright.ops.blocks import block_format

aten = torch.ops.aten
packing = torch.ops.tilewright

Binding = Callable[[tuple[Index, ...]], Register]
# Their first (second) tensor is a condition and stays a boolean whatever the result is.
_CONDITION: dict[object, int] = {aten.where.self: 0, aten.masked_fill.Scalar: 1}


def _cast(text: str, kind: str) -> str:
    """A value in another type; a number written out has no method ``to``."""
    named = text.isidentifier() and text not in ("True", "False")
    return f"{text}.to({kind})" if named else f"tl.full([], {text}, {kind})"


class Evaluator:
    """Evaluates the nodes of one region body into one kernel.

    Args:
        graph: the region's body.
        writer: the kernel.
        inputs: the view behind each placeholder, with the element type of its value.
        bindings: nodes that are already computed, with a function that gives them at an index.
    """

    def __init__(
        self,
        graph: GraphModule,
        writer: KernelWriter,
        inputs: dict[Node, tuple[View, torch.dtype]],
        bindings: dict[Node, Binding] | None = None,
    ) -> None:
        self.graph = graph
        self.writer = writer
        self.inputs = inputs
        self.bindings = bindings or {}
        self.used: dict[Node, str] = {}
        self._guards: tuple[Register, ...] = ()

    def value(self, node: Node, index: tuple[Index, ...]) -> Register:
        """The node's value at an index of its shape, in the type it is held in (half types may be unconverted)."""
        index = without_ones(index, fact(node, TensorType).shape)
        deps = frozenset(name for part in index for name in part.deps)
        cache = self.writer.scope_of(deps | frozenset(n for g in self._guards for n in g.deps)).cache
        key = (node, index, tuple(guard.text for guard in self._guards))
        if key not in cache:
            cache[key] = self._evaluate(node, index)
        found: Register = cache[key]
        return found

    def number(self, node: Node, index: tuple[Index, ...], dtype: torch.dtype | None = None) -> Register:
        """The node's value converted to ``dtype``, or to its compute dtype."""
        value = self.value(node, index)
        return self.convert(value, dtype or compute_dtype(value.dtype))

    def convert(self, value: Register, dtype: torch.dtype) -> Register:
        """The value in another element type."""
        if value.dtype == dtype:
            return value
        if dtype == torch.bool:
            text = self.writer.emit(f"{value.text}_true", f"{value.text} != 0", value.deps)
        else:
            kind = TL_TYPES[dtype]
            hint = f"{value.text}_{kind[3:]}" if value.text.isidentifier() else "number"
            text = self.writer.emit(hint, _cast(value.text, kind), value.deps)
        return Register(text, dtype, value.deps)

    def raw(self, node: Node, index: tuple[Index, ...], dtype: torch.dtype, fill: bool = True) -> Register:
        """The value in the type it is stored in, as an operand of a matrix product.

        Args:
            fill: what a mask leaves out is 0; else it is undefined where the value is only loaded.
        """
        while node not in self.inputs and node not in self.bindings and views.is_view(node):
            node, index = views.source_index(node, index, arguments(node), size_of)
        if node in self.inputs and self.inputs[node][1] == dtype:
            return self.load(*self.inputs[node], index, role(node), raw=True, fill=fill)
        return self.number(node, index, dtype)

    def is_stored(self, node: Node) -> bool:
        """Whether the node is a view of something in memory, so that ``raw`` only loads."""
        while node not in self.inputs and node not in self.bindings and views.is_view(node):
            node = arguments(node)["self"]
        return node in self.inputs

    @contextmanager
    def guarded(self, condition: Register) -> Iterator[None]:
        """Loads inside the block happen only where the condition holds; elsewhere they give 0."""
        before, self._guards = self._guards, (*self._guards, condition)
        yield
        self._guards = before

    def load(
        self, view: View, dtype: torch.dtype, index: Sequence[Index], hint: str, raw: bool = False, fill: bool = True
    ) -> Register:
        """Loads from a view at an index; where index variables do not count, the value is 0, undefined if not ``fill``.

        Half types are widened to their compute dtype unless ``raw``.
        """
        writer = self.writer
        place = linear(index, view.strides)
        deps = place.deps
        pointer = writer.pointer(view, dtype, hint)
        where_true = [mask] if (mask := writer.mask(deps)) else []
        for guard in self._guards:
            # What is one place for a whole tile is an axis of size 1: inside whatever the guard says, and a scalar
            # address takes no mask of a tile.
            if writer.axes(guard.deps) and not writer.axes(place.deps):
                continue
            where_true.append(guard.text)
            deps |= guard.deps
        address = f"{pointer} + {writer.index_text(place)}" if place != constant(0) else pointer
        mask_text = f", mask={' & '.join(where_true)}{', other=0' if fill else ''}" if where_true else ""
        held = dtype if raw else compute_dtype(dtype)
        widen = f".to({TL_TYPES[held]})" if held != dtype else ""
        return Register(writer.emit(hint, f"tl.load({address}{mask_text}){widen}", deps), held, deps)

    def _evaluate(self, node: Node, index: tuple[Index, ...]) -> Register:
        if node in self.bindings:
            return self.bindings[node](index)
        if node in self.inputs:
            view, dtype = self.inputs[node]
            return self.load(view, dtype, index, role(node))
        flow = traits_of(node.target).flow
        rule = self._EVALUATE.get(flow)
        if rule is None:
            raise CodegenError(f"op {node.target} has no kernel", where=where(node), why=f"its flow is {flow.value}")
        result = rule(self, node, index)
        self.used.setdefault(node, result.text)
        return result

    def pointwise(self, node: Node, index: tuple[Index, ...]) -> Register:
        """An elementwise op: its Triton expression over the operands at the same, broadcast index."""
        expression = traits_of(node.target).triton
        if expression is None:
            raise CodegenError(f"op {node.target} declares no Triton expression", where=where(node))
        dtype = fact(node, TensorType).dtype
        given = arguments(node)
        if given.pop("alpha", 1) != 1:
            raise CodegenError(f"op {node.target} still has an alpha", where=where(node))
        if dtype == torch.bool and node.target == aten.add.Tensor:
            raise CodegenError("a sum of booleans has no kernel", where=where(node))
        operands: list[str] = []
        deps: frozenset[str] = frozenset()
        target = self._operand_dtype(node, dtype)
        for position, argument in enumerate(given.values()):
            if isinstance(argument, Node) and find_fact(argument, TensorType) is not None:
                shape = fact(argument, TensorType).shape
                operand = self.value(argument, views.broadcast(index, shape))
                if operand.dtype != torch.bool or (
                    position != _CONDITION.get(node.target) and target.is_floating_point
                ):
                    operand = self.convert(operand, target)
                elif position == _CONDITION.get(node.target):
                    operand = self.convert(operand, torch.bool)
                operands.append(operand.text)
                deps |= operand.deps
            else:
                operands.append(
                    self.writer.size(size_of(argument)) if isinstance(argument, Node) else literal(argument)
                )
        return self._finish(node, expression.format(*operands), deps, dtype)

    def _operand_dtype(self, node: Node, dtype: torch.dtype) -> torch.dtype:
        """Type that operands are converted to: that of the result, or their common one if that is a truth value."""
        if node.target == torch.ops.prims.convert_element_type.default:
            return compute_dtype(fact(node.all_input_nodes[0], TensorType).dtype)
        if dtype != torch.bool:
            return compute_dtype(dtype)
        common: Any = None
        for argument in arguments(node).values():
            if isinstance(argument, Node) and (kind := find_fact(argument, TensorType)) is not None:
                common = kind.dtype if common is None else torch.promote_types(common, kind.dtype)
            elif isinstance(argument, float) and common is not None and not common.is_floating_point:
                common = torch.float32
        return compute_dtype(common)

    def _finish(self, node: Node, expression: str, deps: frozenset[str], dtype: torch.dtype) -> Register:
        """Names the result of an expression, rounded where the op is a change of type."""
        hint = op_name(node)
        kind = compute_dtype(dtype)
        if node.target == torch.ops.prims.convert_element_type.default:
            source = fact(node.all_input_nodes[0], TensorType).dtype
            if dtype == torch.bool:
                expression = f"{expression} != 0"
            elif compute_dtype(source) != dtype:
                expression = _cast(expression, TL_TYPES[dtype]) + (".to(tl.float32)" if kind != dtype else "")
            elif dtype == compute_dtype(source):
                return Register(expression, dtype, deps)
        return Register(self.writer.emit(hint, expression, deps), kind, deps)

    def view(self, node: Node, index: tuple[Index, ...]) -> Register:
        """A view: its source at the mapped index; a concatenation chooses between its sources."""
        if node.target == aten.cat.default:
            return self._concatenate(node, index)
        source, mapped = views.source_index(node, index, arguments(node), size_of)
        return self.value(source, mapped)

    def _concatenate(self, node: Node, index: tuple[Index, ...]) -> Register:
        given = arguments(node)
        axis = int(given["dim"]) % len(index)
        dtype = compute_dtype(fact(node, TensorType).dtype)
        place = self.writer.emit("place", self.writer.index_text(index[axis]), index[axis].deps)
        start: Size = 0
        chosen: Register | None = None
        for source in given["tensors"]:
            size = fact(source, TensorType).shape[axis]
            inside = f"({place} >= {self.writer.size(start)}) & ({place} < {self.writer.size(start + size)})"
            guard = Register(self.writer.emit("inside", inside, index[axis].deps), torch.bool, index[axis].deps)
            moved = (*index[:axis], index[axis] + constant(-start), *index[axis + 1 :])
            with self.guarded(guard):
                part = self.number(source, moved, dtype)
            deps = part.deps | guard.deps
            if chosen is None:
                chosen = part
            else:
                deps |= chosen.deps
                text = self.writer.emit("cat", f"tl.where({guard.text}, {part.text}, {chosen.text})", deps)
                chosen = Register(text, dtype, deps)
            start = start + size
        if chosen is None:
            raise CodegenError("nothing to concatenate", where=where(node))
        return chosen

    def lookup(self, node: Node, index: tuple[Index, ...]) -> Register:
        """``embedding(table, ids)``: the table at the row that the ids name; widened there, if in a block format."""
        given = arguments(node)
        table = given["weight"]
        row = self.loaded_index(given["indices"], index[:-1], fact(table, TensorType).shape[0])
        if node.target is BLOCK_EMBEDDING:
            return self._block_element(table, given["format"], row, index[-1])
        return self.value(table, (row, index[-1]))

    def _block_element(self, table: Node, form: str, row: Index, column: Index) -> Register:
        """An element of a table in a block format."""
        view, dtype = self.inputs[table]
        if block_format(form).decode is None:
            raise CodegenError(f"numbers in {form} are looked up as such", where=where(table))
        writer, deps = self.writer, row.deps | column.deps
        start = writer.index_text(linear((row, constant(0)), view.strides))
        masks = [mask for mask in (writer.mask(deps), *(guard.text for guard in self._guards)) if mask]
        pointer = f"{writer.pointer(view, dtype, 'table')} + {start}"
        call = f"element_{form.lower()}({pointer}, {writer.index_text(column)}, {' & '.join(masks) or 'True'})"
        deps |= frozenset(name for guard in self._guards for name in guard.deps)
        return Register(writer.emit("element", call, deps), torch.float32, deps)

    def packing(self, node: Node, index: tuple[Index, ...]) -> Register:
        """Rows picked by the row index: of all kept places (gather), or one of each sequence; or by a list of rows."""
        given = arguments(node)
        shape = fact(given["x"], TensorType).shape
        if node.target == packing.gather_rows.default:
            row = self.loaded_index(given["row_index"], index[:1], shape[0] * shape[1])
            return self.value(given["x"], (row // shape[1], row % shape[1], *index[1:]))
        if node.target in (packing.select_rows.default, packing.take_rows.default):
            return self.value(given["x"], (self.loaded_index(given["rows"], index[:1], shape[0]), *index[1:]))
        raise CodegenError(f"{node.target} cannot be evaluated element by element", where=where(node))

    def column(self, node: Node, index: tuple[Index, ...]) -> Register:
        """``select_column(x, column)``: each sequence at the column given for it."""
        given = arguments(node)
        length = fact(given["x"], TensorType).shape[1]
        return self.value(given["x"], (index[0], self.column_place(given["column"], index[:1], length), *index[1:]))

    def column_place(self, column: Node, index: tuple[Index, ...], length: Size) -> Index:
        """A column of a sequence as an index below ``length``; negative ones count from the end.

        Kernels stop where it is outside of the sequence, as indexing raises.
        """
        given = self.number(column, index, torch.int64)
        if column.op == "call_function" and column.target == aten.full.default:
            fill = arguments(column)["fill_value"]
            if fill in (0, -1):  # every sequence has a first and a last column
                return constant(0 if fill == 0 else length - 1)
        size, deps = self.writer.size(length), given.deps
        message = "a column that is read lies outside of the sequence"
        self.writer.require(f"({given.text} >= -{size}) & ({given.text} < {size})", message, deps)
        place = f"tl.where({given.text} < 0, {given.text} + {size}, {given.text})"
        return variable(self.writer.emit("column", place, deps), length, deps)

    def loaded_index(self, node: Node, index: tuple[Index, ...], bound: Size) -> Index:
        """The value of an integer node, to be used as an index below ``bound``."""
        row = self.convert(self.value(node, index), torch.int64)
        return variable(row.text, bound, row.deps)

    def create(self, node: Node, index: tuple[Index, ...]) -> Register:
        """Tensors made from sizes: a range, or one value."""
        given = arguments(node)
        dtype = fact(node, TensorType).dtype
        kind = compute_dtype(dtype)
        if node.target == aten.full.default:
            fill = given["fill_value"]
            if isinstance(fill, Node):
                return Register(self.writer.size(size_of(fill)), kind)
            fill = bool(fill) if dtype == torch.bool else float(fill) if dtype.is_floating_point else int(fill)
            return Register(literal(fill), kind)
        start, step = given["start"], given["step"]
        if dtype.is_floating_point:
            raise CodegenError("a range of floating-point numbers has no kernel", where=where(node))
        place = index[0] * size_of(step) + size_of(start)
        number = self.writer.index_text(place)
        made = f"({number}).to({TL_TYPES[kind]})" if place.terms else _cast(number, TL_TYPES[kind])
        return Register(self.writer.emit("arange", made, place.deps), kind, place.deps)

    def reduce(self, node: Node, index: tuple[Index, ...]) -> Register:
        """Reductions and what works along the last axis."""
        return reductions.evaluate(self, node, index)

    _EVALUATE: ClassVar[dict[Flow, Callable[..., Register]]] = {
        Flow.POINTWISE: pointwise,
        Flow.VIEW: view,
        Flow.LOOKUP: lookup,
        Flow.COLUMN: column,
        Flow.PACKING: packing,
        Flow.CREATE: create,
        Flow.LAST_AXIS: reduce,
        Flow.REDUCE: reduce,
    }
