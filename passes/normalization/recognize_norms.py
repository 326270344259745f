"""Norms and activations that models spell out: layer_norm, rms_norm, gelu and silu from their formulas."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.ir.facts import TensorType, fact
from tilewright.ir.graph import Level
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.normalization.match import Bindings, Num, Pattern, Var, call, either, match
from tilewright.passes.rewrite import Rewriter, dtype_of, erase_dead, is_call, rank_of, shape_of

aten = torch.ops.aten
ADD, SUB, MUL, DIV = aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor
X, EPS = Var("x"), Num(name="eps")


def _square(value: Pattern) -> Pattern:
    return either(call(aten.pow.Tensor_Scalar, value, Num(2)), call(MUL, value, value))


def _mean(value: Pattern, name: str) -> Pattern:
    return call(aten.mean.dim, value, name=name)


def _times_inverse_root(value: Pattern, variance: Pattern) -> Pattern:
    """value / sqrt(variance + eps), in the ways it is written."""
    shifted = call(ADD, variance, EPS)
    root = either(call(aten.sqrt.default, shifted), call(aten.pow.Tensor_Scalar, shifted, Num(0.5)))
    inverse = either(
        call(aten.rsqrt.default, shifted),
        call(aten.pow.Tensor_Scalar, shifted, Num(-0.5)),
        call(aten.reciprocal.default, root),
        call(DIV, Num(1), root),
    )
    return either(call(MUL, value, inverse), call(DIV, value, root))


# x / sqrt(mean(x^2) + eps): "Root Mean Square Layer Normalization" (Zhang and Sennrich, 2019), equation 4.
_RMS = _times_inverse_root(X, _mean(_square(X), "mean"))
# (x - mean) / sqrt(var + eps): "Layer Normalization" (Ba et al., 2016), equation 3.
_CENTRED = call(SUB, X, _mean(X, "mean"))
_LAYER = either(
    _times_inverse_root(_CENTRED, _mean(_square(_CENTRED), "mean2")),
    _times_inverse_root(_CENTRED, call(aten.var.correction, X, name="var")),
    _times_inverse_root(_CENTRED, call(aten.var.dim, X, name="var")),
)

# "Gaussian Error Linear Units" (Hendrycks and Gimpel, 2016), section 2: the exact form and the tanh form.
_ROOT = Num(math.sqrt(2 / math.pi), rel=1e-4)
_CUBIC = Num(0.044715)
_SQUARED = _square(X)
_CUBED = either(call(aten.pow.Tensor_Scalar, X, Num(3)), call(MUL, _SQUARED, X))
_SQUARE_TERM = either(call(MUL, _SQUARED, _CUBIC), call(MUL, call(MUL, X, _CUBIC), X))
_CUBE_TERM = either(call(MUL, _CUBED, _CUBIC), call(MUL, _SQUARE_TERM, X))
_SPREAD = call(ADD, _SQUARE_TERM, Num(1))
_INNER = either(
    call(MUL, either(call(ADD, X, _CUBE_TERM), call(MUL, X, _SPREAD)), _ROOT),
    call(MUL, call(MUL, X, _ROOT), _SPREAD),
)
_TANH = call(ADD, call(aten.tanh.default, _INNER), Num(1))
_ERF = call(
    ADD,
    call(
        aten.erf.default, either(call(DIV, X, Num(math.sqrt(2), rel=1e-4)), call(MUL, X, Num(math.sqrt(0.5), rel=1e-4)))
    ),
    Num(1),
)


def _half_times(x: Pattern, factor: Pattern) -> Pattern:
    """0.5 * x * factor in every order."""
    half = Num(0.5)
    halves = [(x, factor), (factor, x)]
    return either(
        call(MUL, call(MUL, x, factor), half),
        call(DIV, call(MUL, x, factor), Num(2)),
        *(call(MUL, either(call(MUL, a, half), call(DIV, a, Num(2))), b) for a, b in halves),
    )


_GELU_TANH = _half_times(X, _TANH)
_GELU_ERF = _half_times(X, _ERF)
_SILU = call(MUL, X, call(aten.sigmoid.default, X))


@dataclass(frozen=True)
class RecognizeNorms(Pass):
    """Turns spelled-out layer norms, root-mean-square norms, GELU and SiLU into their ops."""

    name: ClassVar[str] = "recognize_norms"
    requires: ClassVar[Level] = Level.EXPORTED
    ensures: ClassVar[Level] = Level.EXPORTED

    def run(self, gm: GraphModule) -> PassResult:
        rw = Rewriter(gm, self.name)
        counts = {"norm": 0, "activation": 0}
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or not node.users:
                continue
            if (activation := _activation(rw, node)) is not None:
                rw.replace(node, activation)
                counts["activation"] += 1
            elif (norm := _norm(rw, node)) is not None:
                rw.replace(node, norm)
                counts["norm"] += 1
        for node in list(gm.graph.nodes):
            _absorb(rw, node)
        dead = erase_dead(gm)
        gm.recompile()
        return PassResult(gm, bool(rw.changes or dead), counts)


def _activation(rw: Rewriter, node: Node) -> Node | None:
    if node.target not in (MUL, DIV):
        return None
    type_ = fact(node, TensorType)
    if found := match(_SILU, node):
        return rw.call(node, aten.silu.default, found["x"], type=type_)
    for pattern, approximate in ((_GELU_TANH, "tanh"), (_GELU_ERF, "none")):
        if found := match(pattern, node):
            return rw.call(node, aten.gelu.default, found["x"], type=type_, approximate=approximate)
    return None


def _norm(rw: Rewriter, node: Node) -> Node | None:
    if node.target not in (MUL, DIV):
        return None
    type_ = fact(node, TensorType)
    found = match(_LAYER, node)
    if found and _last_axis(found) and shape_of(found["x"]) == type_.shape:
        return rw.call(
            node, aten.layer_norm.default, found["x"], [type_.shape[-1]], None, None, found["eps"], type=type_
        )
    found = match(_RMS, node)
    if found and _last_axis(found) and shape_of(found["x"]) == type_.shape:
        return rw.call(node, aten.rms_norm.default, found["x"], [type_.shape[-1]], None, found["eps"], type=type_)
    return None


def _last_axis(found: Bindings) -> bool:
    """All reductions of the pattern are over the last axis, keep it, and divide by its full size."""
    x: Node = found["x"]
    last = rank_of(x) - 1
    for name in ("mean", "mean2"):
        if name in found and found[name].args[1:3] != ([last], True):
            return False
    if "var" not in found:
        return isinstance(shape_of(x)[-1], int)
    var: Node = found["var"]
    axes: Any = var.args[1] if len(var.args) > 1 else var.kwargs.get("dim")
    if var.target is aten.var.correction:
        biased, keep = var.kwargs.get("correction") == 0, var.kwargs.get("keepdim", False)
    else:
        rest = (*var.args[2:], True, False)
        biased, keep = rest[0] is False, var.kwargs.get("keepdim", rest[1] if len(var.args) > 3 else False)
    axes = [axes] if isinstance(axes, int) else axes
    return bool(biased and keep) and [a % (last + 1) for a in axes or ()] == [last]


def _absorb(rw: Rewriter, node: Node) -> None:
    """norm * w, and for layer norms + b, with constants of the normalized axis, become operands of the norm."""
    if not is_call(node, MUL, ADD):
        return
    for norm, constant in (node.args, node.args[::-1]):
        if not (is_call(norm, aten.layer_norm.default, aten.rms_norm.default) and isinstance(norm, Node)):
            continue
        if not isinstance(constant, Node) or constant.op != "get_attr" or len(norm.users) != 1:
            continue
        if shape_of(constant) != shape_of(norm)[-1:] or dtype_of(constant) != dtype_of(norm):
            continue
        args = list(norm.args)
        is_layer = norm.target is aten.layer_norm.default
        place = 2 if node.target is MUL else 3
        # A bias comes after the weight: w would scale it otherwise.
        free = args[2] is None and (not is_layer or args[3] is None) if place == 2 else is_layer and args[3] is None
        if free:
            args[place] = constant
            rw.replace(node, rw.call(node, norm.target, *args, type=fact(node, TensorType)))
        return
