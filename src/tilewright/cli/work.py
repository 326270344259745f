"""What the commands do, without printing: open, compile, run, inspect, export."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from torch.fx import GraphModule

from tilewright.cli.console import err
from tilewright.driver import artifact, graph_files
from tilewright.driver.compiled import CompiledModel
from tilewright.driver.kernels import Progress as CompileProgress
from tilewright.driver.kernels import distinct_sources
from tilewright.driver.onnx_export import export_onnx
from tilewright.driver.options import CompileOptions
from tilewright.errors import ArtifactError, InputError, OptionError
from tilewright.ir.graph import Level
from tilewright.models.capture import capture
from tilewright.models.load import Loaded, load_model
from tilewright.passes.base import PassRecord
from tilewright.passes.observe import GraphDiffs
from tilewright.passes.pipeline import pipeline, run_pipeline

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "config.json")


@contextmanager
def compile_progress(quiet: bool) -> Iterator[CompileProgress]:
    """A progress bar for ``tilewright.compile``."""
    with progress_bar(quiet) as bar:
        task = bar.add_task("compiling", total=None)

        def report(done: int, total: int, what: str) -> None:
            bar.update(task, description=what[:48], completed=done, total=total)

        yield report


def progress_bar(quiet: bool) -> Progress:
    """A progress bar on standard error, so that standard output stays clean."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err, transient=True, disable=quiet)


def open_model(name: str) -> Loaded:
    """Opens a model that has weights of its own.

    Raises:
        InputError: there is no such model, or it is a GGUF file, whose weights only ``generate`` reads.
    """
    loaded = load_model(name)
    if loaded.stored is not None:
        raise InputError(
            "this command does not take GGUF files",
            where=name,
            why="their weights stay in the file as they are stored",
            hint="use 'tilewright generate', or tilewright.compile(path) in Python",
        )
    return loaded


def parse_dtype(name: str | None) -> Any:
    """The torch dtype of an option's text, or the text where it is another choice of ``compile``; None stays None."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    return known.get(name, name) if name else None


def compile_model(
    name: str, opt_level: int, unpad: str, gemm: str, dtype: str | None, *, quiet: bool
) -> tuple[Loaded, CompiledModel, float]:
    """Opens and compiles; returns the model, the compiled model and the seconds compiling took."""
    options = CompileOptions(parse_dtype(dtype), opt_level, unpad, "auto", gemm)
    loaded = open_model(name)
    start = time.perf_counter()
    with compile_progress(quiet) as report:
        compiled = CompiledModel(loaded.model, options, progress=report)
        compiled.compile_usual()
    return loaded, compiled, time.perf_counter() - start


def save(compiled: CompiledModel, loaded: Loaded, folder: Path) -> None:
    """Saves the artifact, and beside it the tokenizer's own files."""
    artifact.save(compiled, folder)
    if loaded.folder is not None:
        for name in _TOKENIZER_FILES:
            if (loaded.folder / name).is_file():
                shutil.copyfile(loaded.folder / name, folder / name)


def open_any(
    name: str, opt_level: int, unpad: str, gemm: str, dtype: str | None, *, quiet: bool
) -> tuple[Loaded, CompiledModel]:
    """A saved artifact, or a model that is compiled now."""
    folder = Path(name).expanduser()
    if (folder / artifact.MANIFEST).is_file():
        import transformers

        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError):
            tokenizer = None
        return Loaded(None, tokenizer, folder), artifact.open_artifact(folder)
    loaded, compiled, _ = compile_model(name, opt_level, unpad, gemm, dtype, quiet=quiet)
    return loaded, compiled


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a text file."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}", why=str(error), hint="give UTF-8 text, one text a line") from None


def run_texts(
    compiled: CompiledModel, loaded: Loaded, texts: Sequence[str], batch: int, *, quiet: bool
) -> list[dict[str, torch.Tensor]]:
    """Runs texts in batches as they come; one dict of named outputs a text, pad tokens cut off.

    Raises:
        InputError: the model has no tokenizer.
    """
    if loaded.tokenizer is None:
        raise InputError("the model has no tokenizer", hint="add tokenizer.json to its folder, or call it from Python")
    results = []
    with progress_bar(quiet) as bar:
        task = bar.add_task("running", total=len(texts))
        for start in range(0, len(texts), batch):
            part = list(texts[start : start + batch])
            inputs = loaded.tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            outputs = compiled(**inputs)
            named = outputs.items() if hasattr(outputs, "items") else [("output", outputs)]
            lengths = inputs["attention_mask"].sum(dim=1).tolist()
            padded = inputs["input_ids"].shape[1]
            for row, length in enumerate(lengths):
                cut = {k: v[row, :length] if v.dim() > 2 and v.shape[1] == padded else v[row] for k, v in named}
                results.append(cut)
            bar.advance(task, len(part))
    return results


def save_outputs(results: list[dict[str, torch.Tensor]], path: Path) -> None:
    """Writes outputs as ``<number>.<name>`` tensors."""
    flat = {f"{i}.{name}": value.contiguous() for i, row in enumerate(results) for name, value in row.items()}
    try:
        save_file(flat, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}", why=str(error)) from None


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` shows."""

    records: tuple[PassRecord, ...]
    diffs: tuple[str, ...]
    compiled: CompiledModel
    kernels: dict[str, str]


def inspect_model(name: str, opt_level: int, unpad: str, gemm: str, dtype: str | None, *, quiet: bool) -> Inspection:
    """Compiles with an observer that keeps each pass's diff."""
    loaded = open_model(name)
    diffs = GraphDiffs()
    options = CompileOptions(parse_dtype(dtype), opt_level, unpad, "auto", gemm)
    compiled = CompiledModel(loaded.model, options, observers=(diffs,))
    compiled.compile_usual()
    variants = [v.compiled for v in compiled.variants.values() if v.compiled is not None]
    records = variants[0].records if variants else ()
    sources = [s for v in variants if v.spec is not None for s in distinct_sources(v.spec)]
    return Inspection(records, tuple(diffs.texts), compiled, {source.name: source.text for source in sources})


def export_model(name: str, file_format: str, level: str, out_file: Path | None, unpad: str, dtype: str | None) -> Path:
    """Brings the model to the level and writes it.

    Raises:
        OptionError: unknown format or level.
    """
    known = [each.name.lower() for each in Level]
    if level not in known:
        raise OptionError(f"level {level!r} is not a choice", hint=f"choose one of {', '.join(known)}")
    if file_format not in ("onnx", *graph_files.FORMATS):
        raise OptionError(f"format {file_format!r} is not a choice", hint="choose onnx, json, dot or graphml")
    if file_format == "onnx" and Level[level.upper()] not in (Level.NORMALIZED, Level.PACKED):
        raise OptionError(f"an ONNX file is not made from level {level}", hint="use --level packed or normalized")
    gm = graph_at(open_model(name).model, Level[level.upper()], unpad, dtype)
    path = out_file or Path(f"{Path(name).stem or 'model'}.{file_format}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if file_format == "onnx":
            export_onnx(gm, path)
        else:
            graph_files.write_graph(gm, path, file_format)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}", why=str(error), hint="name a file that can be written") from error
    return path


def graph_at(model: Any, level: Level, unpad: str, dtype: str | None) -> GraphModule:
    """The model's graph at a level, for its usual call."""
    options = CompileOptions(parse_dtype(dtype), unpad=unpad)
    gm = capture(model, dtype=options.model_dtype)
    passes = [each for each in pipeline(2, unpad, "auto", quantize=options.quantized) if each.ensures <= level]
    gm, _ = run_pipeline(gm, passes)
    return gm
