"""Start-up costs, each in a process of its own: imports, cold compile, compile from cache.

python benchmarks/compile_time.py
"""

import json
import os
import subprocess
import sys
import tempfile

IMPORTS = {
    "import tilewright": "import tilewright",
    "import triton, plug-in present": "import triton",
    "import triton, in-tree backends only": "import os; os.environ['TRITON_BACKENDS_IN_TREE'] = '1'; import triton",
}

COMPILE = """
import json, sys, time, torch
from transformers import BertConfig, BertModel
import tilewright
layers = int(sys.argv[1])
torch.manual_seed(0)
model = BertModel(BertConfig(num_hidden_layers=layers)).eval()
import tilewright.driver.compile
start = time.perf_counter()
compiled = tilewright.compile(model)
seconds = time.perf_counter() - start
start = time.perf_counter()
compiled(torch.ones(2, 16, dtype=torch.long))
first = time.perf_counter() - start
from tilewright.cli.show import program_counts
print(json.dumps({"seconds": seconds, "first_call": first, "kernels": program_counts(compiled)["distinct kernels"]}))
"""


def run(code: str, *args: str, env: dict[str, str] | None = None) -> str:
    """Standard output of a new Python process."""
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **(env or {})}).stdout


def import_seconds(code: str, tries: int = 5) -> float:
    """Least seconds of the import statement over several processes."""
    timed = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    return min(float(run(timed)) for _ in range(tries))


def main() -> None:
    """Prints the table."""
    for name, code in IMPORTS.items():
        print(f"{name:40s} {import_seconds(code):7.3f} s")
    with tempfile.TemporaryDirectory() as cache:
        env = {"TILEWRIGHT_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache + "/triton"}
        for name, layers in (("cold", "12"), ("from cache", "12"), ("2 layers", "2"), ("48 layers", "48")):
            found = json.loads(run(COMPILE, layers, env=env))
            print(f"BERT-base size, {layers:>2s} layers, {name:10s} {found}")


if __name__ == "__main__":
    main()
