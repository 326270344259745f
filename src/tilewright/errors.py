"""Every error a user can see: what happened, where, why, and what to do about it."""

from dataclasses import dataclass


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


class CaptureError(TilewrightError):
    """The model could not be traced into a graph."""


class InputError(TilewrightError, ValueError):
    """The arguments of a call do not fit the compiled model."""


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


class UnsupportedOp(TilewrightError):
    """A Triton operation that the selected target cannot run; raised when the kernel is compiled."""


class CodegenError(TilewrightError):
    """A region could not be turned into a kernel."""


class CacheError(TilewrightError):
    """The cache directory cannot be used safely."""


class ArtifactError(TilewrightError):
    """A saved artifact is incomplete, altered, or from a newer version."""
