"""The verifier: checks the spec of the level that a graph says it has reached.

Each level's spec is a table of rules in ``passes.spec_*``; ``docs/levels.md`` has the same in prose.
"""

from torch.fx import GraphModule

from tilewright.errors import VerifierError
from tilewright.ir.facts import where
from tilewright.ir.graph import Level, info
from tilewright.passes.spec.common import COMMON
from tilewright.passes.spec.exported import EXPORTED
from tilewright.passes.spec.fused import FUSED
from tilewright.passes.spec.normalized import NORMALIZED, SPELLING
from tilewright.passes.spec.packed import PACKED
from tilewright.passes.spec.placed import PLACED
from tilewright.passes.spec.rules import Rule, Violation
from tilewright.passes.spec.specialized import SPECIALIZED

SPECS: dict[Level, tuple[Rule, ...]] = {
    Level.EXPORTED: (*COMMON, *EXPORTED),
    Level.NORMALIZED: (*COMMON, *SPELLING, *NORMALIZED),
    Level.PACKED: (*COMMON, *SPELLING, *PACKED),
    Level.FUSED: (*COMMON, *SPELLING, *FUSED),
    Level.SPECIALIZED: (*COMMON, *SPELLING, *FUSED, *SPECIALIZED),
    Level.PLACED: (*COMMON, *SPELLING, *FUSED, *SPECIALIZED, *PLACED),
}


def violations(gm: GraphModule) -> list[tuple[Rule, Violation]]:
    """Everything that breaks the spec of the graph's level, rule by rule.

    A rule may rest on those before it in the table, so after a broken rule the later ones are not looked at.
    """
    for rule in SPECS[info(gm).level]:
        found = list(rule.check(gm))
        if found:
            return [(rule, violation) for violation in found]
    return []


def verify(gm: GraphModule, after: str | None = None) -> None:
    """Checks the spec of the level the graph says it has reached.

    Args:
        gm: a graph with its ``GraphInfo``.
        after: the pass that has just run, for the message.

    Raises:
        VerifierError: names the first broken rule, the node, its line in the model, and the pass.
    """
    found = violations(gm)
    if not found:
        return
    rule, violation = found[0]
    level = info(gm).level.name.lower()
    others = f"; {len(found) - 1} more places break this rule" if len(found) > 1 else ""
    raise VerifierError(
        rule.name,
        f"the graph is not at level {level}: {rule.statement}",
        where=where(violation.node) if violation.node is not None else None,
        why=f"{violation.why}{others}",
        hint=f"pass {after} left the graph so" if after else "the graph was so before the first pass ran",
    )
