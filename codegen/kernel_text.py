"""Turns a written kernel into a module's text, its record, and the step that launches it.

The text holds what the kernel computes and nothing about where it stands in the model, so that regions of equal
structure have equal text and one kernel. Where it stands (graph nodes, source lines) is in ``KernelSource.origin``;
both together are ``KernelSource.readable``.
"""

import ast
import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from torch.fx import Node

from tilewright.codegen.nodes import op_name
from tilewright.codegen.writer import KernelWriter
from tilewright.ir.facts import Origin, find_fact
from tilewright.ir.kernels import KernelSource
from tilewright.ir.program import KernelStep, Pointer, View
from tilewright.ir.sizes import Size
from tilewright.ops import Flow, traits_of

_HEADER = "import triton\nimport triton.language as tl\n"
_LONGEST_NAME = 48
_LONGEST_LINE = 120
_CALLS = re.compile(r"(?<![\w.])(\w+)\(")
_HELPER_FILES = ("helpers.py", "blocks.py")


def finish(
    writer: KernelWriter,
    *,
    family: str,
    summary: str,
    nodes: Sequence[Node],
    variables: dict[Node, str],
    grid: tuple[Size, Size, Size],
    writes: Iterable[View],
    num_warps: int = 4,
    num_stages: int = 1,
) -> KernelStep:
    """The step that launches the kernel in ``writer``.

    Args:
        family: first word of the kernel's name.
        summary: sentences for the docstring of its module.
        nodes: the graph nodes it computes, in order; they name the kernel.
        variables: the variable of the kernel that holds a node's value, for those that have one.
        grid: number of programs along x, y, z.
        writes: the views it stores to.
    """
    function = _function_name(family, nodes)
    params = writer.all_params()
    names = [name for name, _, _ in params] + [f"{name}: tl.constexpr" for name in writer.constants]
    body = [*_signature(function, names), *writer.body()]
    text = _module_text(summary, body)
    signature = tuple((name, kind) for name, kind, _ in params)
    constants = tuple(writer.constants.items())
    digest = hashlib.sha256(repr((text, signature, constants, num_warps, num_stages)).encode()).hexdigest()[:8]
    source = KernelSource(
        name=f"{function}_{digest}",
        text=text,
        function=function,
        signature=signature,
        constexprs=constants,
        num_warps=num_warps,
        num_stages=num_stages,
        asserts=writer.asserts,
        origin=tuple(_origin_line(node, variables.get(node)) for node in nodes),
    )
    args = tuple(argument for _, _, argument in params)
    written = {view.value for view in writes}
    read = {argument.view.value for argument in args if isinstance(argument, Pointer)} - written
    origin = tuple(node.name for node in nodes)
    return KernelStep(source, args, grid, tuple(sorted(read)), tuple(sorted(written)), origin)


def _signature(function: str, names: list[str]) -> list[str]:
    line = f"def {function}({', '.join(names)}):"
    return [line] if len(line) <= _LONGEST_LINE else [f"def {function}(", *(f"    {name}," for name in names), "):"]


def _function_name(family: str, nodes: Sequence[Node]) -> str:
    words = [family]
    # Views name a kernel only where it does nothing else.
    computing = [node for node in nodes if traits_of(node.target).flow not in (Flow.VIEW, Flow.SIZE)]
    for node in computing or nodes:
        word = op_name(node)
        if word not in words and len("_".join((*words, word))) <= _LONGEST_NAME:
            words.append(word)
    return "_".join(words)


def _origin_line(node: Node, variable: str | None) -> str:
    origin = find_fact(node, Origin) or Origin()
    made = "" if origin.made_by == "capture" else f" (made by {origin.made_by})"
    place = f" in {origin.module}" if origin.module else ""
    source = f": {origin.source}" if origin.source else ""
    return f"{variable or op_name(node)}: node {node.name}{made}{place}{source}"


def _module_text(summary: str, body: list[str]) -> str:
    code = "\n".join(["@triton.jit", *body])
    used = _helpers_used(code)
    helpers = [text for name, text in helper_texts().items() if name in used]
    parts = [f'"""{summary}"""', _HEADER.rstrip(), *helpers, code]
    return "\n\n".join(parts[:2]) + "\n\n\n" + "\n\n\n".join(parts[2:]) + "\n"


def _helpers_used(code: str) -> set[str]:
    used: set[str] = set()
    pending = [code]
    while pending:
        called = set(_CALLS.findall(pending.pop())) & helper_texts().keys() - used
        used |= called
        pending += [helper_texts()[name] for name in called]
    return used


@cache
def helper_texts() -> dict[str, str]:
    """Source of each helper function, decorator included, by name."""
    found = {}
    for file in _HELPER_FILES:
        source = (Path(__file__).parent / "templates" / file).read_text()
        lines = source.splitlines()
        for f in ast.parse(source).body:
            if isinstance(f, ast.FunctionDef):
                found[f.name] = "\n".join(lines[f.decorator_list[0].lineno - 1 : f.end_lineno])
    return found
