"""The command line interrupted, killed, and told to write where it cannot; compiling twice at once with one cache."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import BertConfig

from tilewright.errors import ArtifactError

COMMAND = [sys.executable, "-c", "from tilewright.cli import main; main()"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(vocab_size=50, architectures=["BertModel"], **small).save_pretrained(folder)
    return folder / "config.json"


def start(config: Path, out: Path, cache: Path) -> "subprocess.Popen[str]":
    command = [*COMMAND, "compile", str(config), "--out", str(out), "--gemm", "triton", "--json"]
    environment = {**os.environ, "TILEWRIGHT_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", "TILEWRIGHT_VERIFY": "0"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_a_kernel(process: "subprocess.Popen[str]", cache: Path) -> None:
    """Until the process has begun to build kernels: it writes their text first."""
    while process.poll() is None and not list(cache.glob("sources/*.py")):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def test_an_interrupt_ends_with_its_own_code_and_leaves_nothing(config: Path, tmp_path: Path) -> None:
    process = start(config, tmp_path / "out", tmp_path / "cache")
    wait_for_a_kernel(process, tmp_path / "cache")
    process.send_signal(signal.SIGINT)
    text = "".join(process.communicate())
    assert process.returncode == 130
    assert "stopped" in text
    assert "Traceback" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_two_compile_at_once_after_one_was_killed(config: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = start(config, tmp_path / "out", cache)
    wait_for_a_kernel(process, cache)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    for other in [start(config, tmp_path / name, cache) for name in ("a", "b")]:
        printed, errors = other.communicate()
        assert other.returncode == 0, errors
        assert json.loads(printed)["eager parts"] == 0


def test_an_interrupt_while_modules_are_imported(config: Path, tmp_path: Path) -> None:
    process = start(config, tmp_path / "out", tmp_path / "cache")
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    text = "".join(process.communicate())
    # Before Python runs any of our code the interrupt is Python's own.
    assert process.returncode in (130, -signal.SIGINT), text


def test_places_that_cannot_be_written(config: Path, tmp_path: Path) -> None:
    from tilewright.cli import work
    from tilewright.driver import artifact

    (tmp_path / "file").write_text("")
    _, compiled, _ = work.compile_model(str(config), 2, "auto", "triton", None, quiet=True)
    with pytest.raises(ArtifactError, match="cannot write"):
        artifact.save(compiled, tmp_path / "file" / "out")
    with pytest.raises(ArtifactError, match="cannot write"):
        work.export_model(str(config), "json", "packed", tmp_path / "file" / "graph.json", "auto", None)
