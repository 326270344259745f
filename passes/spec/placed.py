"""Rules of the level placed: every region has a device, a stage, and a place for its weights."""

from collections.abc import Iterator

from torch.fx import GraphModule, Node

from tilewright.ir.facts import find_fact
from tilewright.ir.regions import Placement, Region
from tilewright.passes.spec.rules import Rule, Violation, regions

_DEVICES = ("cpu", "cuda")


def _placed(gm: GraphModule) -> Iterator[tuple[Node, Placement]]:
    for call, _ in regions(gm):
        placement = find_fact(call, Placement)
        if placement is not None:
            yield call, placement


def _producers(gm: GraphModule) -> Iterator[tuple[Node, Placement, Node, Placement]]:
    """Each pair of a region and one whose results reach it without another region between them."""
    placements = dict(_placed(gm))
    for call, placement in placements.items():
        pending, seen = list(call.all_input_nodes), set()
        while pending:
            node = pending.pop()
            if node in placements:
                yield call, placement, node, placements[node]
            elif node not in seen:
                seen.add(node)
                pending += node.all_input_nodes


def _is_device(name: str) -> bool:
    kind, _, index = name.partition(":")
    return kind in _DEVICES and (not index or index.isdecimal())


def _placement_known(gm: GraphModule) -> Iterator[Violation]:
    for call, _ in regions(gm):
        if find_fact(call, Placement) is None:
            yield Violation(call, "it carries no Placement")


def _only_regions(gm: GraphModule) -> Iterator[Violation]:
    for node in gm.graph.nodes:
        if find_fact(node, Placement) is not None and find_fact(node, Region) is None:
            yield Violation(node, "it carries a Placement and is no region")


def _device_known(gm: GraphModule) -> Iterator[Violation]:
    for call, placement in _placed(gm):
        if not _is_device(placement.device):
            yield Violation(call, f"{placement.device!r} is not cpu, cuda or cuda:N")


def _tier_known(gm: GraphModule) -> Iterator[Violation]:
    for call, placement in _placed(gm):
        if placement.weight_tier not in (placement.device, "cpu", "disk"):
            yield Violation(
                call, f"weights on {placement.weight_tier!r} are neither on {placement.device}, cpu nor disk"
            )


def _stage_counted(gm: GraphModule) -> Iterator[Violation]:
    for call, placement in _placed(gm):
        if placement.stage < 0:
            yield Violation(call, f"its stage is {placement.stage}")


def _stages_forward(gm: GraphModule) -> Iterator[Violation]:
    for call, placement, producer, earlier in _producers(gm):
        if earlier.stage > placement.stage:
            yield Violation(call, f"stage {placement.stage} reads '{producer.name}' of stage {earlier.stage}")


def _no_gap(gm: GraphModule) -> Iterator[Violation]:
    stages = {placement.stage for _, placement in _placed(gm)}
    for call, placement in _placed(gm):
        if placement.stage > 0 and placement.stage - 1 not in stages:
            yield Violation(call, f"it is in stage {placement.stage}, and no region is in stage {placement.stage - 1}")


def _transfers_explicit(gm: GraphModule) -> Iterator[Violation]:
    for call, placement, producer, earlier in _producers(gm):
        if earlier.device != placement.device:
            yield Violation(call, f"it runs on {placement.device} and reads '{producer.name}' of {earlier.device}")


PLACED = (
    Rule("only_regions_placed", "only regions carry a placement", _only_regions),
    Rule("placement_known", "every region carries its placement", _placement_known),
    Rule("device_known", "a device is cpu, cuda or cuda:N", _device_known),
    Rule("tier_known", "weights are on the region's device, on the cpu or on disk", _tier_known),
    Rule("stage_counted", "stages are counted from 0", _stage_counted),
    Rule("stages_forward", "values flow from a stage to itself or a later one", _stages_forward),
    Rule("stages_without_gap", "no stage is empty", _no_gap),
    Rule("transfers_explicit", "no region reads a value of another device", _transfers_explicit),
)
