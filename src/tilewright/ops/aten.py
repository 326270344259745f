"""Traits of the ATen ops that a normalized graph may contain.

The semantic ops linear, embedding, layer_norm, rms_norm and the activations are ATen's own; only what ATen lacks has
an op in
the ``tilewright`` namespace. In Triton expressions ``tanh`` is a helper that codegen adds to the kernel's module.
"""

import operator

import torch

from tilewright.ops.registry import register
from tilewright.ops.traits import Flow, Traits

aten = torch.ops.aten


def _pointwise(
    target: object,
    triton: str,
    *,
    zero_preserving: bool = False,
    absorbs_zero: bool = False,
    choose: tuple[int, int, int] | None = None,
) -> None:
    traits = Traits(
        Flow.POINTWISE, triton=triton, zero_preserving=zero_preserving, absorbs_zero=absorbs_zero, choose=choose
    )
    register(target, traits)  # type: ignore[arg-type]


_UNARY = {
    aten.neg.default: ("-{0}", True),
    aten.abs.default: ("tl.abs({0})", True),
    aten.floor.default: ("tl.floor({0})", True),
    aten.ceil.default: ("tl.ceil({0})", True),
    aten.sign.default: ("sign({0})", True),
    aten.exp.default: ("tl.exp({0})", False),
    aten.expm1.default: ("expm1({0})", True),
    aten.log.default: ("tl.log({0})", False),
    aten.log1p.default: ("log1p({0})", True),
    aten.sqrt.default: ("tl.sqrt({0})", True),
    aten.rsqrt.default: ("tl.rsqrt({0})", False),
    aten.sin.default: ("tl.sin({0})", True),
    aten.cos.default: ("tl.cos({0})", False),
    aten.tanh.default: ("tanh({0})", True),
    aten.erf.default: ("tl.erf({0})", True),
    aten.sigmoid.default: ("tl.sigmoid({0})", False),
    aten.relu.default: ("tl.where({0} < 0.0, 0.0, {0})", True),
    aten.silu.default: ("{0} * tl.sigmoid({0})", True),
    aten.reciprocal.default: ("1.0 / {0}", False),
    aten.logical_not.default: ("{0} == 0", False),
    aten.bitwise_not.default: ("~{0}", False),
    aten.clone.default: ("{0}", True),
}

_BINARY = {
    aten.add.Tensor: "{0} + {1}",
    aten.sub.Tensor: "{0} - {1}",
    aten.rsub.Scalar: "{1} - {0}",
    aten.mul.Tensor: "{0} * {1}",
    aten.div.Tensor: "{0} / {1}",
    aten.maximum.default: "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    aten.minimum.default: "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    aten.eq.Tensor: "{0} == {1}",
    aten.eq.Scalar: "{0} == {1}",
    aten.ne.Tensor: "{0} != {1}",
    aten.ne.Scalar: "{0} != {1}",
    aten.lt.Tensor: "{0} < {1}",
    aten.lt.Scalar: "{0} < {1}",
    aten.le.Tensor: "{0} <= {1}",
    aten.le.Scalar: "{0} <= {1}",
    aten.gt.Tensor: "{0} > {1}",
    aten.gt.Scalar: "{0} > {1}",
    aten.ge.Tensor: "{0} >= {1}",
    aten.ge.Scalar: "{0} >= {1}",
    aten.logical_and.default: "({0} != 0) & ({1} != 0)",
    aten.logical_or.default: "({0} != 0) | ({1} != 0)",
    aten.bitwise_and.Tensor: "{0} & {1}",
    aten.bitwise_or.Tensor: "{0} | {1}",
}

for _target, (_text, _zero) in _UNARY.items():
    _pointwise(_target, _text, zero_preserving=_zero)
_ABSORBS_ZERO = (aten.mul.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor)
for _target, _text in _BINARY.items():
    _pointwise(_target, _text, absorbs_zero=_target in _ABSORBS_ZERO)
_pointwise(aten.where.self, "tl.where({0}, {1}, {2})", choose=(0, 1, 2))
_pointwise(aten.masked_fill.Scalar, "tl.where({1}, {2}, {0})", choose=(1, 2, 0))
_pointwise(aten.pow.Tensor_Scalar, "pow_scalar({0}, {1})")
# The second operand of gelu is the string "none" (erf form) or "tanh".
_pointwise(aten.gelu.default, "gelu({0}, {1})", zero_preserving=True)
_pointwise(aten.clamp.default, "clamp({0}, {1}, {2})")
# Of softplus the other operands are the factor and the threshold.
_pointwise(aten.softplus.default, "softplus({0}, {1}, {2})")
# The conversion itself; the emitter casts to the node's dtype.
_pointwise(torch.ops.prims.convert_element_type.default, "{0}", zero_preserving=True)

for _target in (aten.layer_norm.default, aten.rms_norm.default):
    register(_target, Traits(Flow.LAST_AXIS, shape_arg=1))
for _target in (aten.softmax.int, aten.cumsum.default):
    register(_target, Traits(Flow.LAST_AXIS, axes_arg=1))
register(aten.linear.default, Traits(Flow.CONTRACT))
register(aten.embedding.default, Traits(Flow.LOOKUP))

register(aten.sum.dim_IntList, Traits(Flow.REDUCE, axes_arg=1, reduce="sum"))
register(aten.mean.dim, Traits(Flow.REDUCE, axes_arg=1, reduce="mean"))
register(aten.amax.default, Traits(Flow.REDUCE, axes_arg=1, reduce="max"))
register(aten.amin.default, Traits(Flow.REDUCE, axes_arg=1, reduce="min"))
register(aten.argmax.default, Traits(Flow.REDUCE, axes_arg=1, reduce="argmax"))

for _target in (
    aten.reshape.default,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dims,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.cat.default,
):
    register(_target, Traits(Flow.VIEW))

for _target in (aten.arange.start_step, aten.full.default):
    register(_target, Traits(Flow.CREATE))
for _on_sizes in (aten.sym_size.int, operator.add, operator.sub, operator.mul, operator.floordiv):
    register(_on_sizes, Traits(Flow.SIZE))

# Everything else may stay in a graph, as OTHER: it runs eager, and these sentences say why for the common ones.
for _target, _why in (
    (aten.matmul.default, "a product of two computed tensors outside attention has no kernel"),
    (aten.bmm.default, "a product of two computed tensors outside attention has no kernel"),
    (aten.index.Tensor, "general advanced indexing reads places known only at run time"),
    (aten.topk.default, "only the largest of the last axis, as many as the model says, have a kernel"),
    (aten.sort.default, "sorting has no kernel"),
):
    register(_target, Traits(Flow.OTHER, why_not=_why))
