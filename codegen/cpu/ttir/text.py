"""Text tools for MLIR's printed form: balanced brackets, strings and source locations."""

import re

_OPEN = {"(": ")", "[": "]", "{": "}", "<": ">"}
_CLOSE = {close: opening for opening, close in _OPEN.items()}
_LOC_DEF = re.compile(r"^(#loc\d*) = loc\((.*)\)$")
_FILE = re.compile(r'"((?:[^"\\]|\\.)*)":(\d+):\d+')


def closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at ``start``; brackets inside strings do not count.

    An arrow ``->`` does not close an angle bracket.

    Raises:
        ValueError: the brackets are not balanced.
    """
    depth = 0
    i = start
    while i < len(text):
        char = text[i]
        if char == '"':
            i = end_of_string(text, i)
            continue
        if char in _OPEN:
            depth += 1
        elif char in _CLOSE and not (char == ">" and text[i - 1] == "-"):
            depth -= 1
            if depth == 0:
                return i
        i += 1
    raise ValueError(f"unbalanced brackets in {text!r}")


def end_of_string(text: str, start: int) -> int:
    """Index after the string literal that begins at ``start``."""
    i = start + 1
    while text[i] != '"':
        i += 2 if text[i] == "\\" else 1
    return i + 1


def split_top(text: str, separator: str) -> list[str]:
    """Parts of ``text`` between separators outside all brackets and strings, stripped; [] for blank text."""
    parts, depth, start, i = [], 0, 0, 0
    while i < len(text):
        char = text[i]
        if char == '"':
            i = end_of_string(text, i)
            continue
        if char in _OPEN:
            depth += 1
        elif char in _CLOSE and not (char == ">" and text[i - 1] == "-"):
            depth -= 1
        elif depth == 0 and text.startswith(separator, i):
            parts.append(text[start:i])
            i += len(separator)
            start = i
            continue
        i += 1
    parts.append(text[start:])
    return [part.strip() for part in parts] if text.strip() else []


def strip_locations(line: str) -> tuple[str, str]:
    """Removes every ``loc(...)`` of a line; returns the rest and the inside of the last one."""
    if "loc(" not in line:
        return line, ""
    kept, last, i, start = [], "", 0, 0
    while i < len(line):
        if line[i] == '"':
            i = end_of_string(line, i)
        elif line.startswith("loc(", i) and (i == 0 or not (line[i - 1].isalnum() or line[i - 1] in "_.%#")):
            end = closing(line, i + 3)
            kept.append(line[start:i].rstrip())
            last, i, start = line[i + 4 : end], end + 1, end + 1
        else:
            i += 1
    kept.append(line[start:])
    return "".join(kept).rstrip(), last


class Locations:
    """Resolves ``#locN`` names to Python ``file:line``.

    Args:
        text: the whole module; definitions may stand before or after their use.
    """

    def __init__(self, text: str) -> None:
        self._defs = {m[1]: m[2] for line in text.splitlines() if (m := _LOC_DEF.match(line.strip()))}

    def source(self, loc: str) -> str:
        """``file:line`` of the outermost call site, which is the line the user wrote; "" if unknown."""
        for _ in range(64):
            if match := _FILE.match(loc):
                return f"{match[1]}:{match[2]}"
            if loc.startswith("#"):
                loc = self._defs.get(loc, "")
            elif loc.startswith("callsite("):
                loc = self._call_site(loc)
            elif loc.startswith('"'):
                inner = loc[end_of_string(loc, 0) :]
                loc = inner[1:-1] if inner.startswith("(") else ""
            else:
                return ""
        return ""

    def _call_site(self, loc: str) -> str:
        callee, _, caller = loc[len("callsite(") : -1].partition(" at ")
        return caller if self.source(caller) else callee
