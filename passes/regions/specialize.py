"""Chooses a GEMM variant for each row count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from tilewright.errors import OptionError
from tilewright.ir.facts import TensorType, fact, find_fact, set_fact
from tilewright.ir.graph import Level
from tilewright.ir.measurements import GemmKey, Measurements
from tilewright.ir.regions import GEMM_VARIANTS, SPLITS, Anchor, GemmTable, Region
from tilewright.ir.sizes import Size, product
from tilewright.ops import Flow, traits_of
from tilewright.ops.blocks import FORMATS
from tilewright.ops.head_linear import HEAD_LINEAR
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.rewrite import argument

VENDOR = "vendor"

Entries = tuple[tuple[int | None, str], ...]

# Timings of one variant differ by this much from one measurement to the next on a machine with other work to do.
_NOISE = 0.05

# Without measurements. Up to about 32 rows a GEMM is bound by reading its weight, and a kernel with the epilogue inside
# saves passes over its result; above, the vendor library's tuning counts for more. DeepSpeed Inference switches alike.
_BY_RULE: dict[str, Entries] = {
    "auto": ((8, "triton_few"), (32, "triton"), (None, VENDOR)),
    "triton": ((8, "triton_few"), (128, "triton"), (None, "triton_many")),
}
_TILE_COLUMNS = 64
_PROGRAMS = 4
"""Programs for each unit of a machine, from which on they end about together: cutting K gains nothing more."""
_LEAST_PART = 512
"""Elements of K that a program should go through at least."""
_BLOCKS_BY_RULE: Entries = ((1, "triton_one"), (4, "triton_few"), (16, "triton"), (None, "triton_many"))


@dataclass(frozen=True)
class Specialize(Pass):
    """Gives each GEMM region its ``GemmTable``.

    Attributes:
        gemm: "auto" for a choice by row count, "triton" for our kernels alone, or one variant for all row counts.
        measurements: timings on this machine; "auto" goes by a rule where there are none.
    """

    name: ClassVar[str] = "specialize"
    requires: ClassVar[Level] = Level.FUSED
    ensures: ClassVar[Level] = Level.SPECIALIZED
    gemm: str = "auto"
    measurements: Measurements = field(default_factory=Measurements, repr=False)

    def run(self, gm: GraphModule) -> PassResult:
        """Sets the facts.

        Raises:
            OptionError: ``gemm`` is not one of the choices.
        """
        choices = dict.fromkeys((*_BY_RULE, *GEMM_VARIANTS))
        if self.gemm not in choices:
            raise OptionError(f"gemm={self.gemm!r} is not a choice", hint=f"choose one of {', '.join(choices)}")
        counts = {"measured": 0, "by_rule": 0}
        for node in gm.graph.nodes:
            region = find_fact(node, Region)
            if region is None or region.anchor is not Anchor.GEMM:
                continue
            body = gm.get_submodule(str(node.target))
            anchor, key = gemm_of(body), gemm_key(body)  # type: ignore[arg-type]
            entries, measured = self._entries(key)
            set_fact(node, GemmTable(product(rows_of(anchor)), entries, measured))
            counts["measured" if measured else "by_rule"] += 1
        return PassResult(gm, True, {topic: count for topic, count in counts.items() if count})

    def _entries(self, key: GemmKey) -> tuple[Entries, bool]:
        timings = self.measurements.seconds.get(key, {})
        if self.gemm == "auto" and timings:
            return measured_entries(timings), True
        choice = "triton" if self.gemm in ("auto", VENDOR) and VENDOR not in variants_of(key) else self.gemm
        if key.dtype in FORMATS and choice == "triton":
            return self._split(_BLOCKS_BY_RULE, key), False
        return self._split(_BY_RULE[choice], key) if choice in _BY_RULE else ((None, choice),), False

    def _split(self, entries: Entries, key: GemmKey) -> Entries:
        """Entries of few rows with K cut into as many parts as give each unit a program, where columns do not."""
        units = self.measurements.units
        tiles = _tiles(key)
        parts = next((count for count in splits_of(key, units) if count * tiles >= units), 0)
        if tiles >= units or not parts:
            return entries
        cut = ("triton_one", "triton_few")
        return tuple((bound, f"{variant}:{parts}" if variant in cut else variant) for bound, variant in entries)


def _tiles(key: GemmKey) -> int:
    return -(-key.n // _TILE_COLUMNS)


def splits_of(key: GemmKey, units: int) -> tuple[int, ...]:
    """Parts that K of a product may be cut into: where tiles of columns alone are few for the units of a machine.

    Args:
        units: programs that the machine runs at once: threads of a CPU, multiprocessors of a GPU.
    """
    if key.heads > 1 or units == 1:
        return ()
    fits = [count for count in SPLITS if _tiles(key) * count <= _PROGRAMS * units]
    # Whole blocks and steps of every type are parts of 256.
    return tuple(count for count in fits if key.k % (256 * count) == 0 and key.k // count >= _LEAST_PART)


def variants_of(key: GemmKey, units: int = 1) -> tuple[str, ...]:
    """The variants there are of a product on a machine that runs so many programs at once.

    The vendor library is not asked for whole numbers and heads. Of numbers, tiles of few rows read a weight as fast as
    those of one do: only weights that have to be unpacked gain by these.
    """
    parts = {str(count) for count in splits_of(key, units)}
    left_out = {variant for variant in GEMM_VARIANTS if ":" in variant and variant.partition(":")[2] not in parts}
    if key.dtype == "int8" or key.dtype in FORMATS or key.heads > 1:
        left_out.add(VENDOR)
    if key.dtype not in FORMATS:
        left_out.update(variant for variant in GEMM_VARIANTS if variant.partition(":")[0] == "triton_one")
    return tuple(variant for variant in GEMM_VARIANTS if variant not in left_out)


def gemm_of(body: GraphModule) -> Node:
    """The product that a GEMM region is built around."""
    return next(node for node in body.graph.nodes if traits_of(node.target).flow is Flow.CONTRACT)


def _heads_of(anchor: Node) -> int:
    """Number of products with parts of the weight that a product is; 1 for a linear."""
    return int(fact(anchor, TensorType).shape[-2]) if anchor.target is HEAD_LINEAR else 1


def rows_of(anchor: Node) -> tuple[Size, ...]:
    """Sizes of the axes that are the rows of a product."""
    return fact(anchor, TensorType).shape[: -2 if anchor.target is HEAD_LINEAR else -1]


def gemm_key(body: GraphModule) -> GemmKey:
    """What timings of a GEMM region are filed under: regions that differ in their number of rows alone share them."""
    anchor = gemm_of(body)
    weight = anchor.args[1]
    if not isinstance(weight, Node):
        raise TypeError(f"the weight of '{anchor.name}' is not a node")
    kind = fact(weight, TensorType)
    n, k = int(kind.shape[0]), fact(anchor.args[0], TensorType).shape[-1]  # type: ignore[arg-type]
    stored = argument(anchor, 3, "format")
    dtype = stored or str(kind.dtype).removeprefix("torch.")
    return GemmKey(n, int(k), dtype, _around(body, anchor), _heads_of(anchor))


def _around(body: GraphModule, anchor: Node) -> str:
    rows = fact(anchor, TensorType).shape[:-1]
    names = {anchor: "product"}
    calls: list[str] = []
    for node in body.graph.nodes:
        if node.op == "placeholder":
            kind = find_fact(node, TensorType)
            names[node] = "size" if kind is None else _kind_text(kind, rows)
        elif node.op == "output":
            if len(node.args[0]) > 1:
                calls.append(", ".join(names[result] for result in node.args[0]))
        elif node is not anchor:
            names[node] = f"%{len(calls)}"
            args = [str(torch.fx.node.map_arg(arg, lambda source: _Named(names[source]))) for arg in node.args]
            args += [f"{name}={value}" for name, value in sorted(node.kwargs.items())]
            calls.append(f"{node.target}({', '.join(args)})")
    return "; ".join(calls)


class _Named(str):
    """A name that prints without quotes where it stands in an argument list."""

    __repr__ = str.__str__


def _kind_text(kind: TensorType, rows: tuple[Size, ...]) -> str:
    leading = "rows" if kind.shape[:-1] == rows else "x".join(map(str, kind.shape[:-1]))
    return f"{str(kind.dtype).removeprefix('torch.')}[{leading}, {kind.shape[-1] if kind.shape else ''}]"


def measured_entries(timings: Mapping[str, Sequence[tuple[int, float]]]) -> Entries:
    """The simplest table that is as fast as was measured, but for what counts as noise.

    At each measured row count a variant within ``_NOISE`` of the fastest is chosen; of the tables that do so, one with
    the fewest changes, and of those the fastest. Between two counts with different choices the one that loses less at
    the count that is not its own holds; below the least and above the greatest count the choice there holds.

    Args:
        timings: by variant, (rows, seconds) at the same row counts.
    """
    counts = sorted({count for times in timings.values() for count, _ in times})
    seconds = {variant: dict(times) for variant, times in timings.items()}
    losses = [_losses(seconds, count) for count in counts]
    chosen = _fewest_changes(losses)
    entries: list[tuple[int | None, str]] = []
    for place in range(len(counts) - 1):
        here, after = chosen[place], chosen[place + 1]
        if here != after:
            stays = losses[place + 1][here] <= losses[place][after]
            entries.append((counts[place + 1] - 1 if stays else counts[place], here))
    return (*entries, (None, chosen[-1]))


def _losses(seconds: Mapping[str, Mapping[int, float]], count: int) -> dict[str, float]:
    """How much longer than the fastest each variant takes, as a ratio less 1."""
    fastest = min(times[count] for times in seconds.values())
    return {variant: times[count] / fastest - 1.0 for variant, times in seconds.items()}


def _fewest_changes(losses: Sequence[Mapping[str, float]]) -> list[str]:
    """A variant for each count, each within the noise: by dynamic programming over (changes, sum of losses)."""
    paths: dict[str, tuple[int, float, list[str]]] = {}
    for at in losses:
        following = {}
        for variant, loss in at.items():
            if loss > _NOISE:
                continue
            ways = [(n + (path[-1] != variant), total, path) for n, total, path in paths.values()] or [(0, 0.0, [])]
            n, total, path = min(ways, key=lambda way: way[:2])
            following[variant] = (n, total + loss, [*path, variant])
        paths = following
    return min(paths.values(), key=lambda way: way[:2])[2]
