"""Contenders in processes of their own, so that none can change what another computes or how fast.

Libraries that serve models clash in one process: one rewrites the weights of a model that others share, several bring
an OpenMP or a oneDNN of their own under the same symbols. A worker is a fresh process (spawned, not forked) that sets
up one contender and is idle until the parent sends it a batch. Seconds are measured inside it.
"""

import ctypes
import gc
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy
import torch

Inputs = Mapping[str, numpy.ndarray]
Run = Callable[[dict[str, torch.Tensor]], Any]
Make = Callable[[], Run]

SET_UP_SECONDS = 300.0  # limit of a set-up, and of a first call, which may compile
# Threads of a contender spin for a while after its call and would take the processor from the next one: those of ONNX
# Runtime for 60 ms, others for at most 10 ms (CPU time of idle workers, measured). So each turn begins with a pause, in
# which they fall asleep, and with a call that is not counted, which wakes its own.
PAUSE_SECONDS = 0.3
TURN_SECONDS = 0.2  # of counted calls, where one call is shorter
CLOSE_SECONDS = 2.0  # for a process to end by itself


class FailedError(Exception):
    """A contender did not do what was asked; the message says why in one line."""


class Worker:
    """A process with one contender.

    Args:
        make: called there once, so it can be pickled; what it returns runs a batch and returns a tensor or an array.

    Raises:
        FailedError: it could not be set up.
    """

    def __init__(self, make: Make) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make))
        self._lost = ""
        self._process.start()
        theirs.close()
        try:
            self._answer(SET_UP_SECONDS)
        except BaseException:
            self.close()
            raise

    def result(self, inputs: Inputs) -> numpy.ndarray:
        """What the contender makes of the batch, in fp32.

        Raises:
            FailedError: it raised an error, died, or took too long. In the last two cases the process is gone.
        """
        return self._ask(_result, inputs, SET_UP_SECONDS)  # type: ignore[no-any-return]

    def seconds(self, inputs: Inputs, limit: float) -> float:
        """Seconds of one call: the median of a turn of ``TURN_SECONDS``, or of the one call that is longer.

        Args:
            inputs: the batch.
            limit: seconds of a call after which the process is ended.

        Raises:
            FailedError: as for ``result``.
        """
        time.sleep(PAUSE_SECONDS)
        return self._ask(_seconds, inputs, 2 * limit + TURN_SECONDS)  # type: ignore[no-any-return]

    def dismiss(self) -> None:
        """Lets the process end by itself, as an idle one does, leaving nothing behind."""
        self._connection.close()

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self.dismiss()
        self._process.join(CLOSE_SECONDS)
        self._process.kill()
        self._process.join()

    def _ask(self, question: Callable[[Run, Inputs], Any], inputs: Inputs, limit: float) -> Any:
        if self._lost:
            raise FailedError(self._lost)
        with suppress(ConnectionError):  # a process that is gone shows in the answer
            self._connection.send((question, inputs))
        return self._answer(limit)

    def _answer(self, limit: float) -> Any:
        try:
            if self._connection.poll(limit):
                value, failure = self._connection.recv()
                if failure:
                    raise FailedError(failure)
                return value
            self._lost = f"ended: no answer in {limit:.1f} s"
        except (EOFError, ConnectionError):
            self._process.join()
            self._lost = f"its process died, exit code {self._process.exitcode}"
        self.close()
        raise FailedError(self._lost)


@contextmanager
def started(makes: Mapping[str, Make]) -> Iterator[tuple[dict[str, Worker], dict[str, str]]]:
    """A worker for each contender, set up one after the other, and why others have none; all end with the block."""
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    try:
        for name, make in makes.items():
            start = time.perf_counter()
            try:
                workers[name] = Worker(make)
            except FailedError as error:
                failed[name] = str(error)
            print(f"{name}: set up in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        yield workers, failed
    finally:
        for worker in workers.values():
            worker.dismiss()
        for worker in workers.values():
            worker.close()


def in_turn(
    workers: Mapping[str, Worker], inputs: Inputs, rounds: int, limit: float
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of a call of each contender, the median of its turns, all in turn in each round; and why others failed.

    Args:
        workers: by name.
        inputs: the batch.
        rounds: turns of each.
        limit: seconds of a call after which a worker is ended.
    """
    samples: dict[str, list[float]] = {name: [] for name in workers}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for name in list(samples):
            try:
                samples[name].append(workers[name].seconds(inputs, limit))
            except FailedError as error:
                failed[name] = str(error)
                del samples[name]
    return {name: statistics.median(values) for name, values in samples.items()}, failed


def _serve(connection: Connection, make: Make) -> None:
    """The process: one answer (value, failure) when set up, and one to each question."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent ends this
    os.dup2(2, 1)  # what libraries print is not the parent's output
    with torch.no_grad():
        made: list[Run] = []
        set_up = _outcome(lambda: made.append(make()))
        # Exporters and converters leave gigabytes in the heap, and all workers are there at once.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        connection.send(set_up)
        while made:
            try:
                question, inputs = connection.recv()
            except EOFError:  # the parent is gone
                return
            connection.send(_outcome(partial(question, made[0], inputs)))


def _outcome(call: Callable[[], Any]) -> tuple[Any, str]:
    try:
        return call(), ""
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        return None, f"{type(error).__name__}: {first}"


def _tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


def _result(run: Run, inputs: Inputs) -> numpy.ndarray:
    return torch.as_tensor(run(_tensors(inputs))).float().numpy()


def _seconds(run: Run, inputs: Inputs) -> float:
    batch = _tensors(inputs)
    run(batch)
    samples: list[float] = []
    while sum(samples) < TURN_SECONDS:
        start = time.perf_counter()
        run(batch)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)
