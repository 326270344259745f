"""Follows one tiny model from Hugging Face to a program and prints every stage; ``docs/design.md`` shows the output.

Weights are left out, names and long lines cut short; ``tilewright inspect`` prints everything.

Usage: ``python docs/follow_one_model.py [STAGE ...]`` with stages of: exported, normalized, packed, fused, specialized,
placed, kernel, steps, memory. Without any, all are printed.
"""

import sys
from collections.abc import Iterator

import torch
from torch.fx import GraphModule
from transformers import BertConfig, BertModel

from tilewright import settings
from tilewright.driver.compile_graph import CompiledGraph
from tilewright.driver.compiled import CompiledModel
from tilewright.driver.options import CompileOptions
from tilewright.ir.facts import find_fact
from tilewright.ir.graph import Level, info
from tilewright.ir.program import Choice, KernelStep, ProgramSpec, ReadTokens, Step, Storage, VendorLinear
from tilewright.ir.regions import AttentionTable, GemmTable, Placement, Region
from tilewright.ir.sizes import size_text
from tilewright.passes.base import Pass, PassRecord
from tilewright.passes.observe import graph_text

WIDTH = 140
SIZES = {"B": 4, "S": 64, "T": 100}


class LastOfLevel:
    """Keeps the graph's text as the last pass of each level left it."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def before(self, step: int, pass_: Pass, gm: GraphModule) -> None:
        """The captured graph, before the first pass."""
        if step == 1:
            self.texts["exported"] = graph_text(gm)

    def after(self, step: int, pass_: Pass, gm: GraphModule, record: PassRecord) -> None:
        """The graph a pass has left."""
        level = info(gm).level
        if level is not Level.EXPORTED:
            self.texts[level.name.lower()] = graph_text(gm)
        if level in (Level.SPECIALIZED, Level.PLACED):
            self.texts[level.name.lower()] = "\n".join(region_facts(gm)) + "\n"


def region_facts(gm: GraphModule) -> Iterator[str]:
    """A line for each region: kernel family, table, placement."""
    for node in gm.graph.nodes:
        region, place = find_fact(node, Region), find_fact(node, Placement)
        table = find_fact(node, GemmTable) or find_fact(node, AttentionTable)
        if isinstance(region, Region):
            line = f"{node.name}: {region.anchor.value}"
            if table is not None:
                line += f", {'rows' if isinstance(table, GemmTable) else 'length'} {table.size}: " + ", ".join(
                    f"{variant} up to {upper}" if upper else f"else {variant}" for upper, variant in table.entries
                )
            if isinstance(place, Placement):
                line += f", on {place.device}, stage {place.stage}, weights on {place.weight_tier}"
            yield line


def kernel_text(spec: ProgramSpec) -> str:
    """The kernel that gathers, embeds and normalizes."""
    kernels = (step.kernel for step in spec.steps if isinstance(step, KernelStep))
    return next(kernel.readable for kernel in kernels if "embedding" in kernel.name)


def step_lines(spec: ProgramSpec) -> Iterator[str]:
    """A line for each step, with the entries of tables below them."""
    names = [value.name for value in spec.values]

    def line(step: Step) -> str:
        reads, writes = (", ".join(names[index] for index in each) for each in (step.reads, step.writes))
        if isinstance(step, KernelStep):
            grid = " x ".join(map(size_text, step.grid))
            return f"kernel {step.kernel.name} on {grid} programs: {reads} -> {writes}"
        if isinstance(step, ReadTokens):
            return f"read {step.symbol} from {reads}"
        return f"{'vendor linear' if isinstance(step, VendorLinear) else 'eager'}: {reads} -> {writes}"

    for step in spec.steps:
        if isinstance(step, Choice):
            yield f"by {step.rows}:"
            for upper, _, entry in step.table:
                for position, inner in enumerate(entry):
                    bound = f"up to {upper}" if upper else "else"
                    yield f"    {bound if position == 0 else '':9} {line(inner)}"
        else:
            yield line(step)


def memory_lines(compiled: CompiledGraph) -> Iterator[str]:
    """The buffers of the arena, and their size for one call."""
    assert compiled.program is not None
    program, spec = compiled.program, compiled.program.spec
    for number, phase in enumerate(program.phases, start=1):
        known = ", ".join(map(str, phase.symbols))
        yield f"phase {number}, sizes known: {known}"
        for buffer in phase.plan.buffers:
            held = (f"{spec.values[life.value].name} ({size_text(life.size)} bytes)" for life in buffer)
            yield f"    buffer: {', '.join(held)}"
    sizes = tuple(SIZES[str(symbol)] for symbol in spec.symbols)
    used, separate = program.planned_bytes(*sizes), program.bytes_without_reuse(*sizes)
    fresh = sum(value.storage is Storage.OUTPUT for value in spec.values)
    yield f"at {SIZES}: {used} bytes, {separate} if nothing were shared; {fresh} fresh outputs"


def main(stages: list[str]) -> None:
    """Prints the stages."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    seen = LastOfLevel()
    # Timings differ from machine to machine, so the GEMM tables here are those of the rule.
    with settings.scope(tune=False):
        model = CompiledModel(BertModel(config).eval(), CompileOptions(), observers=[seen])
    compiled = next(iter(model.variants.values())).compiled
    assert compiled is not None
    assert compiled.spec is not None
    spec = compiled.spec
    texts = seen.texts | {
        "kernel": kernel_text(spec),
        "steps": "\n".join(step_lines(spec)),
        "memory": "\n".join(memory_lines(compiled)),
    }
    for stage in stages or list(texts):
        print(f"== {stage}")
        for line in abridged(texts[stage]):
            print(line)
        print()


def abridged(text: str) -> Iterator[str]:
    """Lines without weights, cut to the width of a page."""
    for full in text.splitlines():
        line = full.replace("encoder_layer_0_", "").replace("encoder.layer.0.", "").replace("default(", "(")
        line = line.replace(".(", "(").replace("embeddings_", "").replace("_embeddings_", "_")
        if " = get_attr " not in line and not (line.startswith("    %") and " = placeholder " in line):
            yield line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


if __name__ == "__main__":
    main(sys.argv[1:])
