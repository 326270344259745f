"""Triton kernels on the CPU backend against torch, bare instruction loops and copies; ratios of one run.

    python benchmarks/kernels.py [--only gemm attention ...] [--json]

Each group is a module of its own beside this one, ``kernels_<group>.py``, with a function ``lines``.
"""

import argparse
import dataclasses
import importlib
import json

from timing import print_lines

GROUPS = ("tiles", "gemm", "rows", "attention", "forms", "matvec", "blocks", "split", "math", "launch")


def main() -> None:
    """Prints one table a group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args()
    collected = {}
    for group in options.only:
        lines = list(importlib.import_module(f"kernels_{group}").lines())
        collected[group] = [dataclasses.asdict(line) | {"reached": line.reached} for line in lines]
        if not options.json:
            print(f"\n## {group}")
            print_lines(lines)
    if options.json:
        print(json.dumps(collected, indent=2))


if __name__ == "__main__":
    main()
