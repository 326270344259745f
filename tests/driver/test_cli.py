"""The command line, run as a person runs it."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import networkx as nx
import pytest
from transformers import BertConfig

from tilewright.cli import main


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(vocab_size=50, architectures=["BertModel"], **small).save_pretrained(folder)
    return folder / "config.json"


@pytest.fixture(scope="module")
def minilm() -> str:
    from tilewright.cli.demo import minilm_folder

    return str(minilm_folder())


def tilewright(*args: str, code: int = 0) -> str:
    """Runs the command in this process: importing torch and transformers anew takes longer than most of them."""
    out, err = io.StringIO(), io.StringIO()
    ended = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["tilewright", *args])
        try:
            main()
        except SystemExit as stop:
            ended = stop.code or 0  # type: ignore[assignment]
    assert ended == code, f"exit {ended}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue() if code == 0 else out.getvalue() + err.getvalue()


def process(*args: str, code: int = 0) -> str:
    """Runs the command in a process of its own, as a person does."""
    command = [sys.executable, "-c", "from tilewright.cli import main; main()", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout if code == 0 else done.stdout + done.stderr


def test_compile_then_run_the_artifact(minilm: str, tmp_path: Path) -> None:
    written = json.loads(tilewright("compile", minilm, "--out", str(tmp_path / "m"), "--json"))
    assert written["distinct kernels"] > 3
    texts = tmp_path / "texts.txt"
    texts.write_text("a cat\n\nthe second, rather longer text of this file\n")
    from_model = json.loads(tilewright("run", minilm, "--file", str(texts), "--json"))
    from_folder = json.loads(process("run", str(tmp_path / "m"), "--file", str(texts), "--json"))
    assert from_folder["outputs"] == from_model["outputs"]
    assert len(from_folder["outputs"]) == 2
    assert from_folder["stats"]["eager_steps"] == 0
    assert from_folder["stats"]["rows_computed"] < from_folder["stats"]["rows_padded"]


def test_inspect(config: Path) -> None:
    report = json.loads(tilewright("inspect", str(config), "--json"))
    names = [record["name"] for record in report["passes"]]
    assert "remove_padding" in names
    assert len(report["diffs"]) == len(names)
    assert "pack_index" in "".join(report["diffs"])
    assert "remove_padding" in tilewright("inspect", str(config), "--kernels")


@pytest.mark.parametrize("file_format", ["json", "dot", "graphml"])
@pytest.mark.parametrize("level", ["normalized", "packed", "placed"])
def test_export_graph_files(config: Path, tmp_path: Path, file_format: str, level: str) -> None:
    path = tmp_path / f"graph.{file_format}"
    tilewright("export", str(config), "--format", file_format, "--level", level, "--out", str(path))
    if file_format == "graphml":
        graph = nx.read_graphml(path)
        assert nx.is_directed_acyclic_graph(graph)
        assert len(graph) > 10
    elif file_format == "json":
        assert json.loads(path.read_text())["level"] == level
    else:
        assert path.read_text().startswith("digraph")


def test_env() -> None:
    values = json.loads(process("env", "--json"))
    assert values["versions"]["torch"].startswith("2.13")
    assert values["cpu"]["vector bits"] >= 128


def test_errors_are_one_message_without_a_traceback(config: Path, tmp_path: Path) -> None:
    for args in (
        ("run", str(tmp_path / "nothing"), "--text", "x"),
        ("run", str(config), "--text", "x"),
        ("compile", str(config), "--out", str(tmp_path / "o"), "--unpad", "maybe"),
        ("export", str(config), "--format", "png"),
        ("run", str(config)),
    ):
        text = tilewright(*args, code=1)
        assert "Error" in text
        assert "Traceback" not in text
    assert json.loads(tilewright("run", str(config), "--json", code=1))["error"] == "InputError"
    text = process("run", str(tmp_path / "nothing"), "--text", "x", code=1)
    assert "Error" in text
    assert "Traceback" not in text
