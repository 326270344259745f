"""Counters of a compiled model: how often it was compiled and what its runs did."""

import threading
from dataclasses import dataclass, field


@dataclass
class Stats:
    """Counters since the model was compiled.

    Attributes:
        compilations: graphs compiled; owned by the driver.
        calls: runs that ended without an error.
        kernels_launched: kernels with at least one program.
        vendor_calls: GEMMs by the vendor library.
        eager_steps: parts of the graph that ran as they were.
        rows_computed: packed rows T, summed over calls; all B * S rows where nothing is packed.
        rows_padded: rows a padded run would have computed, B * S, summed over calls.
        fallbacks: calls of a whole model that ran eager; owned by the driver.
    """

    compilations: int = 0
    calls: int = 0
    kernels_launched: int = 0
    vendor_calls: int = 0
    eager_steps: int = 0
    rows_computed: int = 0
    rows_padded: int = 0
    fallbacks: int = 0


@dataclass
class RunCounts:
    """What one run did, kept apart until the run has ended."""

    kernels_launched: int = 0
    vendor_calls: int = 0
    eager_steps: int = 0
    rows_computed: int = 0
    rows_padded: int = 0


@dataclass
class Recorder:
    """Adds finished runs to ``stats``; runs may end in several threads at once."""

    stats: Stats
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, run: RunCounts) -> None:
        """Counts one call."""
        stats = self.stats
        with self._lock:
            stats.calls += 1
            stats.kernels_launched += run.kernels_launched
            stats.vendor_calls += run.vendor_calls
            stats.eager_steps += run.eager_steps
            stats.rows_computed += run.rows_computed
            stats.rows_padded += run.rows_padded
