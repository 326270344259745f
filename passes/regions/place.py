"""Decides where each region runs and where its weights live."""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from tilewright.ir.facts import find_fact, set_fact
from tilewright.ir.graph import Level
from tilewright.ir.regions import Placement, Region
from tilewright.passes.base import Pass, PassResult


@dataclass(frozen=True)
class Place(Pass):
    """Puts every region on one device, in one stage, with its weights beside it: each carries that ``Placement``.

    Attributes:
        device: name of the device.
    """

    name: ClassVar[str] = "place"
    requires: ClassVar[Level] = Level.SPECIALIZED
    ensures: ClassVar[Level] = Level.PLACED
    device: str = "cpu"

    def run(self, gm: GraphModule) -> PassResult:
        """Sets the facts."""
        regions = [node for node in gm.graph.nodes if find_fact(node, Region)]
        for node in regions:
            set_fact(node, Placement(self.device, 0, self.device))
        return PassResult(gm, True, {self.device: len(regions)})
