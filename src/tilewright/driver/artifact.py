"""A compiled model as a folder: graph JSON, safetensors, kernel text. Opening it runs nothing of its contents.

The kernel text is there to be read and to be compared: a loaded program makes its kernels anew from the graph, and
says so if the
text of this version differs from the text stored.
"""

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import tilewright
from tilewright.driver.compile_graph import CompiledGraph, load
from tilewright.driver.compiled import CompiledModel, Variant
from tilewright.driver.kernels import distinct_sources
from tilewright.driver.options import CompileOptions
from tilewright.errors import ArtifactError, InputError
from tilewright.ir.graph import info
from tilewright.ir.serialize import graph_from_json, graph_to_json
from tilewright.models.inputs import CallSignature, name_arguments
from tilewright.runtime.stats import Stats

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"


def save(compiled: CompiledModel, folder: str | Path) -> Path:
    """Writes the compiled model into ``folder``, which must be new, empty, or an earlier artifact.

    The files are staged beside it and moved in one rename, so an interrupted save leaves nothing half-written.

    Raises:
        ArtifactError: nothing was compiled, the model runs eager, or the folder holds other files.
    """
    if not compiled.variants:
        compiled.compile_usual()
    made = [(signature, variant.compiled) for signature, variant in compiled.variants.items()]
    variants = [(signature, graph) for signature, graph in made if graph is not None and graph.spec is not None]
    if not variants:
        why = "; ".join(compiled.reasons.values()) or "it has not been called yet, or opt_level is 0"
        raise ArtifactError("there is no compiled program to save", why=why, hint="call the model once, then save it")
    target = Path(folder)
    if target.exists() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise ArtifactError(f"will not write into {target}", why="it holds other files", hint="name a new folder")
    try:
        _replace(target, compiled, variants)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {target}", why=str(error), hint="name a folder that can be written"
        ) from error
    return target


def _replace(target: Path, compiled: CompiledModel, variants: list[tuple[CallSignature, CompiledGraph]]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as staged:
        stage = Path(staged) / "artifact"
        stage.mkdir()
        _write(compiled, variants, stage)
        if target.exists():
            os.rename(target, Path(staged) / "replaced")
        os.rename(stage, target)


def _write(compiled: CompiledModel, variants: list[tuple[CallSignature, CompiledGraph]], folder: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    graphs, kernels = [], {}
    for signature, made in variants:
        graphs.append({"signature": signature.to_json(), **graph_to_json(made.graph, tensors)})
        for source in distinct_sources(made.spec) if made.spec else ():
            kernels[f"kernels/{source.name}.py"] = source.text
    (folder / "kernels").mkdir()
    for name, text in kernels.items():
        (folder / name).write_text(text)
    save_file({key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / "graph.json").write_text(json.dumps(graphs, indent=1))
    options = {key: str(v) if v is not None else None for key, v in asdict(compiled.options).items()}
    files = {str(p.relative_to(folder)): _digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    manifest = {"format": 1, "tilewright": tilewright.__version__, "options": options, "sha256": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def open_artifact(folder: str | Path) -> "LoadedModel":
    """Opens what ``save`` wrote.

    Raises:
        ArtifactError: a file is missing, altered or of a newer version; the message names it.
    """
    root = Path(folder)
    manifest = _read_json(root / MANIFEST)
    if manifest.get("format") != 1:
        raise ArtifactError(f"cannot open {root}", why=f"format {manifest.get('format')!r} is unknown to this version")
    for name, digest in manifest["sha256"].items():
        path = root / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not path.is_file() or path.is_symlink():
            raise ArtifactError(f"{path} is missing or not a plain file", hint="compile the model again")
        if _digest(path) != digest:
            raise ArtifactError(f"{path} was altered", why="its sha256 is not the manifest's", hint="compile again")
    with safe_open(root / WEIGHTS, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    stored = {Path(name).stem: (root / name).read_text() for name in manifest["sha256"] if name.startswith("kernels/")}
    return LoadedModel(_read_json(root / "graph.json"), tensors, stored)


class LoadedModel(CompiledModel):
    """A model opened from an artifact: callable as the original was, for the call signatures that were compiled.

    Attributes:
        changed_kernels: names of kernels that this version of tilewright writes differently from the one that saved
            them.
    """

    def __init__(self, graphs: list[dict[str, Any]], tensors: dict[str, torch.Tensor], stored: dict[str, str]) -> None:
        super().__init__(None, CompileOptions())
        self.changed_kernels: list[str] = []
        for data in graphs:
            gm = graph_from_json(data, tensors)
            stats = Stats(compilations=1)
            program = load(gm, stats)
            spec = program.spec
            texts = {source.name: source.text for source in distinct_sources(spec)}
            self.changed_kernels += [name for name, text in texts.items() if stored.get(name) != text]
            compiled = CompiledGraph(gm, (), spec, program, stats)
            self._variants[CallSignature.from_json(data["signature"])] = Variant(compiled, info(gm))

    def _signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSignature:
        for signature, variant in self._variants.items():
            given = {k: v for k, v in name_arguments(signature.parameters, args, kwargs).items() if v is not None}
            tensors = {name for name, value in given.items() if isinstance(value, torch.Tensor)}
            statics = {name: value for name, value in given.items() if name not in tensors}
            known = {argument.name for argument in signature.tensors}
            optional = {spec.name for spec in variant.info.inputs if spec.default} if variant.info else set()
            if tensors <= known <= tensors | optional and statics.items() <= dict(signature.statics).items():
                return signature
        raise InputError(
            "the saved model was not compiled for this call",
            why=f"it was compiled for: {'; '.join(map(str, self._variants))}",
            hint="call it with the same arguments as when it was compiled, or compile the model again",
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        hint = "is this a folder that `tilewright compile` made?"
        raise ArtifactError(f"cannot read {path}", why=str(error), hint=hint) from None
