"""How much memory a step reads, and how fast this machine reads memory: what bounds decoding of a few sequences."""

import time
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from tilewright.codegen.cpu.read_loop import STREAMS, read_loop
from tilewright.driver.steps import StepModel
from tilewright.ir.graph import get_tensor
from tilewright.runtime.pages import empty_bytes

_LOOKUPS = (torch.ops.aten.embedding.default, torch.ops.tilewright.block_embedding.default)
_PROBE_BYTES = 256 << 20  # larger than the caches of processors
_PROBES = 5


@dataclass(frozen=True)
class Traffic:
    """Bytes that a decoding step reads.

    Attributes:
        weights: all weights once, without tables of which only rows are looked up; of experts all are counted.
        per_slot: keys and values of one token, all layers.
    """

    weights: int
    per_slot: int

    def per_token(self, context: float) -> float:
        """Bytes for the next token of a single sequence that has ``context`` tokens."""
        return self.weights + context * self.per_slot


def traffic(model: StepModel) -> Traffic:
    """What a step of this model reads."""
    graph = model.compiled.graph
    read = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and not _only_looked_up(graph, node):
            tensor = get_tensor(graph, node)
            read[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return Traffic(sum(read.values()), model.make_pages(1).bytes // model.page_size)


def read_bandwidth() -> float:
    """Bytes a second that kernels' threads read from memory: the best of some bare loops over more than caches hold."""
    data = empty_bytes(_PROBE_BYTES).fill_(1)
    seconds = []
    for loop in [read_loop(data, streams) for streams in STREAMS] * _PROBES:
        start = time.perf_counter()
        loop()
        seconds.append(time.perf_counter() - start)
    return _PROBE_BYTES / min(seconds)


def _only_looked_up(graph: GraphModule, node: Node) -> bool:
    """Whether all uses of a weight look up rows of it, also inside of regions."""
    for user in node.users:
        if user.op == "call_module":
            region = graph.get_submodule(str(user.target))
            assert isinstance(region, GraphModule)
            inside = region.graph.find_nodes(op="placeholder")
            used = [place for place, given in zip(inside, user.args, strict=True) if given is node]
            if not all(_only_looked_up(region, place) for place in used):
                return False
        elif user.target not in _LOOKUPS or user.args[0] is not node:
            return False
    return True
