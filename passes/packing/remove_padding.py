"""RemovePadding: from work on every place of the padded batch to work on its real tokens alone.

One row index is computed from the key validity; each padded value that packed work needs is gathered once, each
per-token output is scattered once, and nothing in between is padded. The analysis is ``passes.layout``; this pass acts.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from tilewright.errors import PackingRefused
from tilewright.ir.facts import set_fact
from tilewright.ir.graph import Level, info, update_info
from tilewright.passes.base import Pass, PassResult
from tilewright.passes.layout.analysis import Packing, analyze, describe
from tilewright.passes.layout.validity import NotPackable, find_validity
from tilewright.passes.packing.rewriter import PackingRewriter


@dataclass(frozen=True)
class RemovePadding(Pass):
    """Packs the graph where that is legal.

    Attributes:
        unpad: "auto" leaves the graph padded where packing is not legal, with the reason in
            ``GraphInfo.reasons["packing"]``; "on" raises ``PackingRefused`` instead; "off" only tags the layouts.
        token_inputs: integer inputs [B, S] that are packed from the start: the caller knows that nothing reads their
            masked places. What is computed from them is then computed for real tokens alone.
    """

    name: ClassVar[str] = "remove_padding"
    requires: ClassVar[Level] = Level.NORMALIZED
    ensures: ClassVar[Level] = Level.PACKED

    unpad: str = "auto"
    token_inputs: tuple[str, ...] = ()

    def run(self, gm: GraphModule) -> PassResult:
        """Packs the graph in place, or tags it as padded.

        Raises:
            PackingRefused: ``unpad="on"`` and a legality rule is broken; names the node, its line and the rule.
        """
        if self.unpad == "off":
            return _leave_padded(gm, "turned off by the option unpad='off'")
        try:
            packing = analyze(gm, find_validity(gm), frozenset(self.token_inputs))
        except NotPackable as refused:
            if self.unpad == "on":
                raise PackingRefused(
                    f"padding cannot be removed: rule {refused.rule} is broken",
                    where=refused.where,
                    why=refused.why,
                    hint="compile with unpad='auto' to run this model padded",
                ) from None
            return _leave_padded(gm, describe(refused))
        counts = PackingRewriter(gm, packing).run()
        return PassResult(gm, changed=True, counts=counts)


def _leave_padded(gm: GraphModule, reason: str) -> PassResult:
    packing: Packing = analyze(gm, None)
    for node, layout in packing.layouts.items():
        set_fact(node, layout)
    update_info(gm, reasons={**info(gm).reasons, "packing": reason})
    return PassResult(gm, changed=True, counts={"packed": 0}, reasons={"packing": reason})
