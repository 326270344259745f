"""SplitSource: an encoder-decoder becomes two graphs, cut where the decoder's attentions read what the encoder made.

What is computed from the source's inputs alone is the same for every token that is generated. So one graph computes
it: its results are the keys and values that the decoder's cross-attentions see, layer by layer. The other graph is
given them, and is a causal model like any other. Which node belongs where follows from what it is computed from: the
source, the tokens, both, or neither (weights, sizes).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.errors import CacheRefused
from tilewright.ir.facts import Origin, SizeValue, TensorType, copy_origin, fact, find_fact, set_fact, where
from tilewright.ir.graph import InputSpec, Level, OutputSpec, info, update_info
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.layout.axes import positional, shape_of
from tilewright.passes.rewrite import erase_dead

aten = torch.ops.aten
ATTENTION = torch.ops.tilewright.attention.default
_WHAT = "the model cannot be cut into source and target"
_KEYS, _VALUES = 1, 2  # places among the arguments of attention
_SOURCE, _TARGET = "source", "target"
_Domains = dict[Node, frozenset[str]]


@dataclass(frozen=True)
class SplitSource(Pass):
    """Keeps one half of an encoder-decoder.

    The source's half has the results [B, S, Hkv, D] that are keys, and [B, S, Hkv, Dv] that are values, of each
    cross-attention in the order of the layers. The target's half has them as inputs [B, Hkv, S, D] and
    [B, Hkv, S, Dv], and the source's validity beside them. S is the length of the source in the former; in the latter
    the two lengths are still one symbol, as they were captured.

    Attributes:
        keep: "source" or "target".
        source: names of the inputs that are the source; the others are the target.
    """

    name: ClassVar[str] = "split_source"
    requires: ClassVar[Level] = Level.NORMALIZED
    ensures: ClassVar[Level] = Level.NORMALIZED

    keep: str
    source: tuple[str, ...] = ("input_ids", "attention_mask")

    def run(self, gm: GraphModule) -> PassResult:
        """Rewrites the graph in place.

        Raises:
            CacheRefused: the target reads the source elsewhere than as keys and values of attention; says where.
        """
        domains = _domains(gm, self.source)
        crossing = _cross_attentions(gm, domains)
        if not crossing:
            raise CacheRefused(_WHAT, why="no attention of its decoder reads keys of its encoder")
        if self.keep == _SOURCE:
            _keep_source(gm, crossing)
        else:
            _keep_target(gm, crossing, domains)
        kept = [spec for spec in info(gm).inputs if (spec.name in self.source) == (self.keep == _SOURCE)]
        if self.keep == _TARGET:
            kept += [spec for spec in info(gm).inputs if spec.name in self.source and _reads(gm, spec.name)]
        _erase_other_inputs(gm, kept)
        gm.graph.lint()
        gm.recompile()
        return PassResult(gm, changed=True, counts={"cross attention": len(crossing)})


def _domains(gm: GraphModule, source: Sequence[str]) -> _Domains:
    """Which inputs each node's numbers come from. Sizes have no part in it."""
    found: _Domains = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            found[node] = frozenset((_SOURCE if node.target in source else _TARGET,))
        elif find_fact(node, SizeValue) is not None or node.op == "output":
            found[node] = frozenset()
        else:
            found[node] = frozenset().union(*(found[operand] for operand in node.all_input_nodes))
    return found


def _cross_attentions(gm: GraphModule, domains: _Domains) -> list[Node]:
    """The attentions of the target whose keys are of the source, in order.

    Raises:
        CacheRefused: something else of the target reads the source, or such an attention is more than that.
    """
    found = []
    for node in gm.graph.nodes:
        read = [each for each in node.all_input_nodes if domains[each] == {_SOURCE}]
        if node.op == "output" or _TARGET not in domains[node] or not read:
            continue
        why = _why_not_cross(node, domains)
        if why:
            raise CacheRefused(_WHAT, where=where(node), why=why)
        found.append(node)
    return found


def _why_not_cross(node: Node, domains: _Domains) -> str | None:
    if node.target is not ATTENTION:
        read = next(each for each in node.all_input_nodes if domains[each] == {_SOURCE})
        return f"'{node.name}' reads '{read.name}', which is computed from the source, and is no attention"
    given = positional(node)
    q, k, v, valid, bias, sinks, _, causal, left, right, _, *tables = given
    if domains[k] != {_SOURCE} or domains[v] != {_SOURCE} or domains[q] == {_SOURCE}:
        return "its keys and values are not both of the source, or its queries are"
    if valid is not None and domains[valid] != {_SOURCE}:
        return f"the validity '{valid.name}' of its keys is not of the source"
    if causal or left >= 0 or right >= 0 or any(each is not None for each in (bias, sinks, *tables[:4])) or tables[4]:
        return "it has an order, a window, a bias or sinks beside the source's validity"
    return None


def _keep_source(gm: GraphModule, crossing: list[Node]) -> None:
    output = next(node for node in gm.graph.nodes if node.op == "output")
    results, names = [], []
    for number, node in enumerate(crossing):
        for kind, place in (("keys", _KEYS), ("values", _VALUES)):
            results.append(_by_token(gm, positional(node)[place], output))
            names.append(f"source_{kind}_{number}")
    output.args = (tuple(results),)
    erase_dead(gm)
    update_info(gm, output=OutputSpec(build=list, names=tuple(names)))


def _by_token(gm: GraphModule, heads: Node, before: Node) -> Node:
    """[B, S, H, D] of keys or values [B, H, S, D]."""
    if heads.target is aten.permute.default and list(positional(heads)[1]) == [0, 2, 1, 3]:
        return positional(heads)[0]
    batch, count, length, size = shape_of(heads)
    with gm.graph.inserting_before(before):
        made = gm.graph.call_function(aten.permute.default, (heads, [0, 2, 1, 3]))
    set_fact(made, TensorType((batch, length, count, size), fact(heads, TensorType).dtype))
    copy_origin(heads, made, SplitSource.name)
    return made


def _keep_target(gm: GraphModule, crossing: list[Node], domains: _Domains) -> None:
    output = next(node for node in gm.graph.nodes if node.op == "output")
    specs = list(info(gm).inputs)
    first = next(node for node in gm.graph.nodes if node.op == "placeholder")
    for number, node in enumerate(crossing):
        given = positional(node)
        for kind, place in (("keys", _KEYS), ("values", _VALUES)):
            name = f"source_{kind}_{number}"
            type_ = fact(given[place], TensorType)
            with gm.graph.inserting_before(first):
                made = gm.graph.placeholder(name)
            set_fact(made, type_)
            set_fact(made, Origin(made_by=SplitSource.name))
            given[place] = made
            specs.insert(2 * number + place - _KEYS, InputSpec(name, type_.dtype, type_.shape))
        node.args = tuple(given)
    described = info(gm).output
    results: Any = output.args[0]
    kept = [place for place, result in enumerate(results) if _TARGET in domains[result]]
    output.args = (tuple(results[place] for place in kept),)
    names = tuple(described.names[place] for place in kept)
    erase_dead(gm)
    update_info(gm, inputs=tuple(specs), output=OutputSpec(build=list, names=names))


def _reads(gm: GraphModule, name: str) -> bool:
    """Whether a number of the input is read; its sizes are the same for all inputs."""
    node = next(each for each in gm.graph.nodes if each.op == "placeholder" and each.target == name)
    return any(find_fact(user, SizeValue) is None for user in node.users)


def _erase_other_inputs(gm: GraphModule, kept: list[InputSpec]) -> None:
    """Removes inputs; a size that was read off one of them is read off one that stays."""
    names = {spec.name for spec in kept}
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node in nodes:
        if node.target in names:
            continue
        for user in list(node.users):
            twin = _of_size(nodes, names, fact(user, SizeValue))
            user.args = twin
        gm.graph.erase_node(node)
    order = [spec.name for spec in info(gm).inputs]
    update_info(gm, inputs=tuple(sorted(kept, key=lambda spec: order.index(spec.name))))


def _of_size(nodes: list[Node], names: set[str], size: SizeValue) -> tuple[Node, int]:
    return next(
        (node, axis)
        for node in nodes
        if node.target in names
        for axis, each in enumerate(shape_of(node))
        if each == size.value
    )
