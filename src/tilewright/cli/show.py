"""What the commands print: rich tables for people, one JSON object for programs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from tilewright.cli.work import Inspection
from tilewright.driver.compiled import CompiledModel
from tilewright.driver.kernels import distinct_sources
from tilewright.ir.facts import find_fact
from tilewright.ir.program import EagerStep
from tilewright.ir.regions import Region
from tilewright.passes.base import PassRecord


def fields(out: Console, values: Mapping[str, Any], as_json: bool) -> None:
    """A two-column table."""
    if as_json:
        out.print_json(json.dumps(dict(values)))
        return
    table = Table(show_header=False, box=None)
    for name, value in values.items():
        table.add_row(f"[bold]{name}", str(value))
    out.print(table)


def sections(out: Console, values: Mapping[str, Mapping[str, Any]], as_json: bool) -> None:
    """Named groups of fields."""
    if as_json:
        out.print_json(json.dumps(values))
        return
    for name, group in values.items():
        out.rule(f"[bold]{name}", align="left")
        fields(out, group, False)


def pass_table(records: Sequence[PassRecord]) -> Table:
    """One line a pass: time, nodes before and after, what it found."""
    table = Table("pass", title="passes", title_justify="left")
    for column in ("ms", "nodes before", "after"):
        table.add_column(column, justify="right")
    table.add_column("found")
    for record in records:
        found = ", ".join(f"{count} {name}" for name, count in record.counts.items())
        row = (record.name, f"{record.seconds * 1e3:.0f}", str(record.nodes_before), str(record.nodes_after), found)
        table.add_row(*row)
    return table


def program_counts(compiled: CompiledModel) -> dict[str, Any]:
    """Regions, steps and kernels over all variants compiled so far."""
    counts = {"regions": 0, "steps": 0, "distinct kernels": 0, "eager parts": 0}
    for variant in compiled.variants.values():
        if variant.compiled is None or variant.compiled.spec is None:
            continue
        spec, graph = variant.compiled.spec, variant.compiled.graph
        counts["regions"] += sum(find_fact(node, Region) is not None for node in graph.graph.nodes)
        counts["steps"] += len(spec.steps)
        counts["distinct kernels"] += len(distinct_sources(spec))
        counts["eager parts"] += sum(isinstance(step, EagerStep) for step in spec.steps)
    return counts


def compiled(out: Console, model: CompiledModel, seconds: float, where: str, as_json: bool) -> None:
    """What `compile` prints."""
    values = {"seconds": round(seconds, 2), **program_counts(model), "written": where}
    fields(out, values | {f"reason ({topic})": why for topic, why in model.reasons.items()}, as_json)


def results(
    out: Console, texts: Sequence[str], rows: Sequence[dict[str, torch.Tensor]], model: CompiledModel, as_json: bool
) -> None:
    """What `run` prints: shapes and the first numbers of each output, or all numbers as JSON."""
    stats = asdict(model.stats)
    if as_json:
        outputs = [{name: value.float().tolist() for name, value in row.items()} for row in rows]
        out.print_json(json.dumps({"outputs": outputs, "stats": stats}))
        return
    table = Table("text", "output", "shape", "first values")
    for text, row in zip(texts, rows, strict=True):
        for name, value in row.items():
            first = " ".join(f"{number:+.4f}" for number in value.float().flatten()[:4].tolist())
            table.add_row(text[:48], name, str(list(value.shape)), first)
    out.print(table)
    out.print(f"rows computed {stats['rows_computed']:,}, padded {stats['rows_padded']:,}")


def inspection(out: Console, report: Inspection, diff: bool, lines: int, kernels: bool, as_json: bool) -> None:
    """What `inspect` prints."""
    model = report.compiled
    if as_json:
        records = [asdict(record) for record in report.records]
        values = {"passes": records, "diffs": list(report.diffs), "reasons": model.reasons, **program_counts(model)}
        out.print_json(json.dumps(values | ({"kernels": report.kernels} if kernels else {})))
        return
    for record, text in zip(report.records, report.diffs, strict=True):
        out.rule(f"[bold]{record.name}", align="left")
        if diff and text:
            kept = text.splitlines()
            shown = kept[:lines] if lines else kept
            out.print(Syntax("\n".join(shown), "diff", background_color="default", word_wrap=False))
            if len(kept) > len(shown):
                out.print(f"... {len(kept) - len(shown)} more lines (--lines 0 shows all)")
        for where, why in record.reasons.items():
            out.print(f"[yellow]not done[/] {where}: {why}", highlight=False)
    out.print(pass_table(report.records))
    fields(out, program_counts(model), False)
    for topic, why in model.reasons.items():
        out.print(f"[yellow]reason[/] ({topic}): {why}", highlight=False)
    for name, text in report.kernels.items() if kernels else ():
        out.rule(f"[bold]{name}", align="left")
        out.print(Syntax(text, "python", background_color="default"))
