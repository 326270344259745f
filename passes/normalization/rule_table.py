"""Rewrites of one node by its op: a table of functions, and the loop that applies them once to every call."""

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule, Node

from tilewright.passes.base import PassResult
from tilewright.passes.rewrite import Rewriter, erase_dead

Rule = Callable[[Rewriter, Node], Node | None]


class RuleTable:
    """Rules by op. A rule gets a call and returns what takes its place, or None to leave it."""

    def __init__(self) -> None:
        self.rules: dict[Any, Rule] = {}

    def rule(self, *targets: Any) -> Callable[[Rule], Rule]:
        """Decorator: the function rewrites calls of these ops."""

        def add(function: Rule) -> Rule:
            self.rules.update(dict.fromkeys(targets, function))
            return function

        return add

    def apply(self, gm: GraphModule, made_by: str, topic: str) -> PassResult:
        """Rewrites every call that has a rule, and removes what that leaves unused.

        Args:
            gm: rewritten in place.
            made_by: name of the pass, for the origin of new nodes.
            topic: what the number of rewrites is called in the result.
        """
        rw = Rewriter(gm, made_by)
        for node in list(gm.graph.nodes):
            rule = self.rules.get(node.target) if node.op == "call_function" else None
            new = rule(rw, node) if rule else None
            if new is not None and new is not node:
                rw.replace(node, new)
        dead = erase_dead(gm)
        gm.recompile()
        return PassResult(gm, bool(rw.changes or dead), {topic: rw.changes})
