"""What a pass is: a frozen dataclass whose fields are its options, from one level to another."""

import operator
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import ClassVar, Protocol

from torch.fx import GraphModule

from tilewright.errors import TilewrightError
from tilewright.ir.graph import Level, info, update_info


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        graph: the resulting graph module; may be the one given, changed in place.
        changed: whether any node was added, removed or rewritten, or any fact set.
        counts: what the pass found, by topic, e.g. ``{"attention": 6}``; shown to the user.
        reasons: what was not done and why, by topic or node name.
    """

    graph: GraphModule
    changed: bool
    counts: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PassRecord:
    """One line of the pipeline's history: what ran, how long, and what it changed."""

    name: str
    seconds: float
    nodes_before: int
    nodes_after: int
    op_diff: dict[str, int]
    counts: dict[str, int]
    reasons: dict[str, str]


class Observer(Protocol):
    """Sees the graph around every pass."""

    def before(self, step: int, pass_: "Pass", gm: GraphModule) -> None:
        """Called before pass number ``step`` (from 1) runs."""

    def after(self, step: int, pass_: "Pass", gm: GraphModule, record: PassRecord) -> None:
        """Called once the pass has run and its level was verified."""


@dataclass(frozen=True)
class Pass:
    """Base of all passes.

    A subclass sets ``name`` (snake case, equal to its file name), the level it ``requires`` and the level the graph
    meets afterwards (``ensures``), and implements ``run``. Passes hold no state between runs.
    """

    name: ClassVar[str]
    requires: ClassVar[Level]
    ensures: ClassVar[Level]

    def run(self, gm: GraphModule) -> PassResult:
        """Rewrites or tags the graph."""
        raise NotImplementedError(f"{type(self).__name__} does not implement run")

    def __str__(self) -> str:
        options = ",".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))
        return f"{self.name}{{{options}}}" if options else self.name


def op_counts(gm: GraphModule) -> Counter[str]:
    """How often each op is called, regions included by their contents."""
    counts: Counter[str] = Counter()
    for node in gm.graph.nodes:
        if node.op == "call_module":
            body = gm.get_submodule(str(node.target))
            if isinstance(body, GraphModule):
                counts += op_counts(body)
                continue
        # Choosing one of several results is no work, and every outlined region would add some.
        if node.op.startswith("call_") and node.target is not operator.getitem:
            counts[str(node.target)] += 1
    return counts


def run_pass(pass_: Pass, gm: GraphModule) -> tuple[GraphModule, PassRecord]:
    """Runs one pass and checks what it says of itself.

    Raises:
        TilewrightError: the graph is below the level required, or the pass reports no change and made one.
    """
    level = info(gm).level
    if level < pass_.requires:
        raise TilewrightError(
            f"pass {pass_} needs a graph at level {pass_.requires.name.lower()}",
            why=f"this one is at level {level.name.lower()}",
            hint="run the passes in the order of tilewright.passes.pipeline",
        )
    before = op_counts(gm)
    text = str(gm.graph)
    start = time.perf_counter()
    result = pass_.run(gm)
    seconds = time.perf_counter() - start
    if not result.changed and (result.graph is not gm or str(gm.graph) != text):
        raise TilewrightError(f"pass {pass_} says that it changed nothing, but the graph differs")
    if info(result.graph).level < pass_.ensures:
        update_info(result.graph, level=pass_.ensures)
    after = op_counts(result.graph)
    diff = {op: after[op] - before[op] for op in sorted(before.keys() | after.keys()) if after[op] != before[op]}
    totals = (sum(before.values()), sum(after.values()))
    return result.graph, PassRecord(pass_.name, seconds, *totals, diff, result.counts, result.reasons)
