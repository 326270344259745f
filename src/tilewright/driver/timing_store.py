"""Timings of variants in the cache, filed under the problem and everything else that they depend on."""

import json
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch

from tilewright import settings
from tilewright.codegen.cpu import store
from tilewright.codegen.cpu.launch import num_threads
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.codegen.cpu.version import toolchain_version

Timings = dict[str, tuple[tuple[int, float], ...]]
"""By variant, (size, seconds), as ``tilewright.ir.measurements.Measurements`` holds them."""


def may_measure() -> bool:
    """Not with the setting ``tune`` off, and not in checked mode, in which kernels take longer."""
    return bool(settings.get("tune")) and not settings.get_once("check")


def stored_or_measured(kind: str, key: Any, opt_level: int, measure: Callable[[], Timings]) -> Timings:
    """The timings of a problem; another machine, thread count or version measures anew.

    Args:
        kind: of table.
        key: the problem, a dataclass of plain values.
        opt_level: how long is measured.
        measure: called where nothing is stored.
    """
    machine = (CpuTarget.native().key, num_threads(), torch.__version__)
    entry = store.key(kind, toolchain_version(), *map(str, (*astuple(key), opt_level, *machine)))
    content = store.get(entry)
    if content is None:
        timings = measure()
        store.put(entry, json.dumps(timings).encode())
        return timings
    return {name: tuple((size, seconds) for size, seconds in times) for name, times in json.loads(content).items()}
