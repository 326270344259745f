"""Every error a user can see: what happened, where, why, and what to do about it."""

import linecache
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Where:
    """A place in the user's model or kernel.

    Attributes:
        node: name of the graph node, or of the kernel.
        source: Python line the node came from, as ``file:line`` with the code where known.
    """

    node: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        parts = [f"node '{self.node}'" if self.node else "", f"from {self.source}" if self.source else ""]
        return ", ".join(part for part in parts if part)


class TilewrightError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: one sentence: what could not be done.
        where: the node, kernel or file it happened at.
        why: the reason, with the offending value.
        hint: what the reader can do.
    """

    def __init__(self, what: str, *, where: Where | str | None = None, why: str = "", hint: str = "") -> None:
        self.what = what
        self.where = where
        self.why = why
        self.hint = hint
        lines = [what]
        lines += [f"  where: {where}"] if where and str(where) else []
        lines += [f"  why:   {why}"] if why else []
        lines += [f"  do:    {hint}"] if hint else []
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes send errors back; the constructors take more than the text that is kept in args.
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[TilewrightError], args: tuple[Any, ...], attributes: dict[str, Any]) -> TilewrightError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class CaptureError(TilewrightError):
    """The model could not be traced into a graph."""


class InputError(TilewrightError, ValueError):
    """The arguments of a call do not fit the compiled model."""


class GgufError(InputError):
    """A GGUF file is incomplete or damaged, or holds something that is not read."""


class OptionError(TilewrightError, ValueError):
    """An option or setting has a value outside its range."""


class VerifierError(TilewrightError):
    """A graph breaks a rule of the level it claims to be at.

    Attributes:
        rule: name of the broken rule in the level's spec.
    """

    def __init__(
        self, rule: str, what: str, *, where: Where | str | None = None, why: str = "", hint: str = ""
    ) -> None:
        self.rule = rule
        super().__init__(f"[{rule}] {what}", where=where, why=why, hint=hint)


class PackingRefused(TilewrightError):
    """Padding removal is not legal for this model and ``unpad="on"`` was asked for."""


class CacheRefused(TilewrightError):
    """A model cannot go on from a cache of keys and values, so it cannot generate token by token."""


class UnsupportedOp(TilewrightError):
    """A Triton operation that the selected target cannot run; raised when the kernel is compiled."""


class CodegenError(TilewrightError):
    """A region could not be turned into a kernel."""


class KernelStopped(TilewrightError):
    """A kernel on the CPU stopped itself; what it had not computed yet is missing from its outputs.

    Attributes:
        kernel: its name.
        source: Python line as ``file:line``, "" if unknown.
        program: coordinates of the program that stopped.
    """

    def __init__(
        self, what: str, *, kernel: str, source: str, program: tuple[int, int, int], why: str = "", hint: str = ""
    ) -> None:
        self.kernel, self.source, self.program = kernel, source, program
        places = [f"kernel '{kernel}'", _with_code(source), f"program {program}"]
        where = ", ".join(place for place in places if place)
        super().__init__(what, where=where, why=why, hint=hint)


class MemoryViolation(KernelStopped):
    """In checked mode: an access outside of the tensors that the kernel was given. It did not happen.

    Attributes:
        address: of the access.
        nbytes: that it would have read or written there.
        kind: "load", "store" or "atomic".
    """

    def __init__(self, what: str, *, address: int, nbytes: int, kind: str, **more: Any) -> None:
        self.address, self.nbytes, self.kind = address, nbytes, kind
        super().__init__(what, **more)


class KernelAssertion(KernelStopped, AssertionError):
    """A ``tl.device_assert`` failed.

    Attributes:
        message: of the assertion.
    """

    def __init__(self, message: str, **more: Any) -> None:
        self.message = message
        super().__init__(f"device_assert failed: {message}" if message else "device_assert failed", **more)


def _with_code(source: str) -> str:
    """``file:line`` with the line's text, where the file can be read."""
    path, _, line = source.rpartition(":")
    code = linecache.getline(path, int(line)).strip() if line.isdigit() else ""
    return f"{source} ({code})" if code else source


class CacheError(TilewrightError):
    """The cache directory cannot be used safely."""


class ArtifactError(TilewrightError):
    """A saved artifact is incomplete, altered, or from a newer version."""
