"""One spelling for elementwise ops, conversions and tensors made from sizes."""

from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, fact, find_fact
from tilewright.ir.graph import Level, get_tensor
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.normalization.rule_table import RuleTable
from tilewright.passes.rewrite import Rewriter, argument, dtype_of, is_call, operand, rank_of

aten = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default
_TABLE = RuleTable()
_rule = _TABLE.rule


@dataclass(frozen=True)
class NormalizePointwise(Pass):
    """Rewrites scalar forms to tensor forms with a number, conversions to convert_element_type, fills to full."""

    name: ClassVar[str] = "normalize_pointwise"
    requires: ClassVar[Level] = Level.EXPORTED
    ensures: ClassVar[Level] = Level.EXPORTED

    def run(self, gm: GraphModule) -> PassResult:
        return _TABLE.apply(gm, self.name, "pointwise")


_RENAMED: dict[Any, Any] = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.divide.Tensor: aten.div.Tensor,
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.max.other: aten.maximum.default,
    aten.min.other: aten.minimum.default,
    aten.absolute.default: aten.abs.default,
    aten.negative.default: aten.neg.default,
    aten.concat.default: aten.cat.default,
    aten.not_equal.Scalar: aten.ne.Scalar,
    aten.greater.Tensor: aten.gt.Tensor,
    aten.less.Tensor: aten.lt.Tensor,
    aten._softmax.default: aten.softmax.int,
    aten.special_expit.default: aten.sigmoid.default,
}

_LIMITS: dict[Any, Any] = {
    aten.maximum.default: lambda least: (least,), aten.minimum.default: lambda most: (None, most),
}  # fmt: skip


@_rule(*_RENAMED, *_LIMITS, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
def _binary(rw: Rewriter, node: Node) -> Node | None:
    if node.target is aten._softmax.default:
        return _softmax(rw, node)
    target = _RENAMED.get(node.target, node.target)
    args, alpha = list(node.args), argument(node, 2, "alpha", 1)
    if target in (aten.add.Tensor, aten.sub.Tensor):
        if alpha != 1:
            second = args[1]
            scaled = second * alpha if not isinstance(second, Node) else rw.call(node, aten.mul.Tensor, second, alpha)
            args[1] = scaled
        args = args[:2]
    args = [_number(rw, node, arg) if i < 2 else arg for i, arg in enumerate(args)]
    if target in _LIMITS and not isinstance(args[1], Node):  # the op takes no numbers
        return rw.call(node, aten.clamp.default, args[0], *_LIMITS[target](args[1]), type=fact(node, TensorType))
    if target is node.target and tuple(args) == node.args and not node.kwargs:
        return _neutral(node)
    return rw.call(node, target, *args, type=fact(node, TensorType))


def _number(rw: Rewriter, node: Node, arg: Any) -> Any:
    """A constant of no axes becomes a number; only where another operand keeps the node's dtype and shape."""
    others = [a for a in node.args if _is_tensor(a) and a is not arg and rank_of(a) > 0]
    same = others and dtype_of(others[0]) == dtype_of(node) and arg is not operand(node)
    return _value(rw, arg) if same else arg


def _is_tensor(arg: Any) -> TypeGuard[Node]:
    """Whether it is a tensor's node, not that of a size."""
    return isinstance(arg, Node) and find_fact(arg, TensorType) is not None


def _value(rw: Rewriter, arg: Any) -> Any:
    """The number that a constant of no axes holds; anything else as it is."""
    if not _is_tensor(arg) or rank_of(arg) != 0:
        return arg
    if is_call(arg, aten.full.default):
        return operand(arg, 1)
    if arg.op != "get_attr" or isinstance(tensor := get_tensor(rw.gm, arg), torch.nn.Parameter):
        return arg
    return tensor.item()


def _neutral(node: Node) -> Node | None:
    """x + 0, x - 0, x * 1 and x / 1 of the same dtype are x."""
    first, second = operand(node), operand(node, 1)
    if is_call(second, aten.full.default):
        second = operand(second, 1)
    if not isinstance(first, Node) or isinstance(second, Node | bool):
        return None
    unit = 0 if node.target in (aten.add.Tensor, aten.sub.Tensor) else 1
    return first if second == unit and fact(first, TensorType) == fact(node, TensorType) else None


@_rule(aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(rw: Rewriter, node: Node) -> Node | None:
    """other - alpha * x, written other + (-x), which rounds the same."""
    first, second = operand(node), operand(node, 1)
    alpha = argument(node, 2, "alpha", 1)
    scaled = first if alpha == 1 else rw.call(node, aten.mul.Tensor, first, alpha)
    negative = rw.call(node, aten.neg.default, scaled)
    return rw.call(node, aten.add.Tensor, negative, second, type=fact(node, TensorType))


@_rule(aten.square.default)
def _square(rw: Rewriter, node: Node) -> Node | None:
    return rw.call(node, aten.pow.Tensor_Scalar, operand(node), 2, type=fact(node, TensorType))


@_rule(aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar, aten.where.self)
def _where(rw: Rewriter, node: Node) -> Node | None:
    """A number beside a tensor of the node's dtype is a masked fill; other numbers become tensors of no axes."""
    condition, first, second = node.args
    type_ = fact(node, TensorType)
    if is_call(node, aten.where.self):
        numbers = [_value(rw, arg) for arg in (first, second)]
        if sum(isinstance(number, Node) for number in numbers) != 1:
            return None
        first, second = numbers
        if dtype_of(first if isinstance(first, Node) else second) != type_.dtype:
            return None
    if isinstance(second, Node) and dtype_of(second) == type_.dtype:
        return rw.call(node, aten.masked_fill.Scalar, second, condition, first, type=type_)
    if isinstance(first, Node) and dtype_of(first) == type_.dtype:
        negated = rw.call(node, aten.logical_not.default, condition)
        return rw.call(node, aten.masked_fill.Scalar, first, negated, second, type=type_)
    values = [v if isinstance(v, Node) else _scalar(rw, node, v) for v in (first, second)]
    return rw.call(node, aten.where.self, condition, *values, type=type_)


def _scalar(rw: Rewriter, node: Node, value: Any) -> Node:
    return rw.call(node, aten.full.default, [], value, dtype=dtype_of(node), device=_device(rw, node))


@_rule(aten.masked_fill.Tensor)
def _masked_fill(rw: Rewriter, node: Node) -> Node | None:
    value = _number(rw, node, operand(node, 2))
    if isinstance(value, Node):
        return rw.call(node, aten.where.self, operand(node, 1), value, operand(node), type=fact(node, TensorType))
    return rw.call(node, aten.masked_fill.Scalar, *node.args[:2], value, type=fact(node, TensorType))


@_rule(aten.addcmul.default, aten.addcdiv.default)
def _addc(rw: Rewriter, node: Node) -> Node | None:
    inner = aten.mul.Tensor if node.target is aten.addcmul.default else aten.div.Tensor
    part = rw.call(node, inner, *node.args[1:3])
    value = argument(node, 3, "value", 1)
    part = part if value == 1 else rw.call(node, aten.mul.Tensor, part, value)
    return rw.call(node, aten.add.Tensor, operand(node), part, type=fact(node, TensorType))


@_rule(aten.addmm.default, aten.baddbmm.default)
def _scaled_product(rw: Rewriter, node: Node) -> Node | None:
    """beta * x + alpha * (a @ b) written out where there are factors, or where the product is one of batches."""
    start, first, second = node.args[:3]
    beta, alpha = argument(node, 3, "beta", 1), argument(node, 4, "alpha", 1)
    if node.target is aten.addmm.default and alpha == beta == 1:
        return None
    type_ = fact(node, TensorType)
    plain = aten.mm.default if node.target is aten.addmm.default else aten.bmm.default
    product = rw.call(node, plain, first, second, type=type_)
    product = product if alpha == 1 else rw.call(node, aten.mul.Tensor, product, alpha, type=type_)
    if beta == 0:  # as in torch: what is multiplied by 0 is not read, NaN or not
        return product
    start = start if beta == 1 else rw.call(node, aten.mul.Tensor, start, beta)
    return rw.call(node, aten.add.Tensor, product, start, type=type_)


@_rule(
    aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default,
    aten.float.default if hasattr(aten, "float") else aten.to.dtype, CONVERT,
)  # fmt: skip
def _convert(rw: Rewriter, node: Node) -> Node | None:
    """A dtype change is one op; a move to another device is none of ours and stays."""
    source = operand(node)
    device: Any = node.kwargs.get("device", operand(node, 1) if node.target is aten.to.device else None)
    if device is not None and torch.device(device) != _device(rw, source):
        return None
    dtype = dtype_of(node)
    if dtype == dtype_of(source):
        return source
    return None if node.target is CONVERT else rw.call(node, CONVERT, source, dtype, type=fact(node, TensorType))


def _device(rw: Rewriter, node: Node) -> torch.device:
    """All values are where the weights are."""
    weight = next(iter(rw.gm.graph.find_nodes(op="get_attr")), None)
    return get_tensor(rw.gm, weight).device if weight is not None else torch.device("cpu")


@_rule(aten.softmax.int)
def _softmax(rw: Rewriter, node: Node) -> Node | None:
    source = operand(node)
    rank = rank_of(source)
    axis = int(operand(node, 1)) % rank
    axis = -1 if axis == rank - 1 else axis
    wanted = dtype_of(node)
    if is_call(node, aten.softmax.int) and node.args == (source, axis) and not node.kwargs:
        return None
    if dtype_of(source) != wanted:
        source = rw.call(node, CONVERT, source, wanted)
    return rw.call(node, aten.softmax.int, source, axis, type=fact(node, TensorType))


@_rule(aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)
def _reduce(rw: Rewriter, node: Node) -> Node | None:
    source = operand(node)
    rank, given = rank_of(source), argument(node, 1, "dim")
    given = [given] if isinstance(given, int) else given or list(range(rank))
    axes, keep = sorted(a % rank for a in given), argument(node, 2, "keepdim", False)
    if node.target in (aten.mean.dim, aten.sum.dim_IntList):
        return _accumulate(rw, node, source, axes, keep)
    if node.args == (source, axes, keep) and not node.kwargs:
        return None
    return rw.call(node, node.target, source, axes, keep, type=fact(node, TensorType))


def _accumulate(rw: Rewriter, node: Node, source: Node, *args: Any) -> Node | None:
    """The op without its ``dtype``, its operand converted before; sums of integers are int64, converted after."""
    type_ = fact(node, TensorType)
    narrow = not type_.dtype.is_floating_point and type_.dtype != torch.int64
    wide = TensorType(type_.shape, torch.int64) if narrow else type_
    if dtype_of(source) != wide.dtype:
        source = rw.call(node, CONVERT, source, wide.dtype)
    if node.args == (source, *args) and not node.kwargs:
        return None
    total = rw.call(node, node.target, source, *args, type=wide)
    return rw.call(node, CONVERT, total, type_.dtype, type=type_) if narrow else total


@_rule(aten.cumsum.default)
def _cumsum(rw: Rewriter, node: Node) -> Node | None:
    source = operand(node)
    axis = int(argument(node, 1, "dim")) % rank_of(source)
    return _accumulate(rw, node, source, -1 if axis == rank_of(source) - 1 else axis)


@_rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(rw: Rewriter, node: Node) -> Node | None:
    start: Any = 0
    end, step = operand(node), 1
    if node.target is not aten.arange.default:
        start, end = node.args[:2]
        step = argument(node, 2, "step", 1)
    kwargs = {"dtype": dtype_of(node), "device": _device(rw, node)}
    if node.args == (start, end, step) and node.kwargs == kwargs:
        return None
    return rw.call(node, aten.arange.start_step, start, end, step, type=fact(node, TensorType), **kwargs)


_FILLED: dict[Any, Any] = {
    aten.zeros.default: 0, aten.ones.default: 1, aten.zeros_like.default: 0, aten.ones_like.default: 1,
    aten.new_zeros.default: 0, aten.new_ones.default: 1, aten.full_like.default: None, aten.new_full.default: None,
    aten.scalar_tensor.default: None, aten.full.default: None,
    # Any number will do where nobody said which.
    aten.empty.memory_format: 0, aten.empty_like.default: 0, aten.new_empty.default: 0,
}  # fmt: skip


@_rule(*_FILLED)
def _full(rw: Rewriter, node: Node) -> Node | None:
    type_ = fact(node, TensorType)
    value: Any = _FILLED[node.target]
    match node.target:
        case aten.full_like.default:
            value = operand(node, 1)
        case aten.full.default:
            value = operand(node, 1)
        case aten.new_full.default:
            value = operand(node, 2)
        case aten.scalar_tensor.default:
            value = operand(node)
    if isinstance(value, Node):
        return None
    if type_.dtype.is_floating_point or type_.dtype == torch.bool:
        value = bool(value) if type_.dtype == torch.bool else float(value)
    sources = [a for a in node.args if isinstance(a, Node) and "like" in str(node.target)]
    given = next((a for a in node.args if isinstance(a, list | tuple)), ())
    if not sources:
        sizes = [s if isinstance(s, int) else g for s, g in zip(type_.shape, given, strict=True)]
    else:
        sizes = [rw.size(node, s, sources) for s in type_.shape]
    kwargs = {"dtype": type_.dtype, "device": _device(rw, node)}
    if node.target is aten.full.default and node.args == (sizes, value) and node.kwargs == kwargs:
        return None
    return rw.call(node, aten.full.default, sizes, value, type=type_, **kwargs)
