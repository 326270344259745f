"""The page ``docs/coverage.md`` from the results of all cases."""

from collections.abc import Iterable, Sequence

from tests.coverage.cases import Case
from tests.coverage.names import DESCRIPTOR_FACTS, FOREIGN_TYPES, MODULES, NUMBERS, STUBS, TYPES
from tests.coverage.values import DTYPES

_SHORT = {"int1": "i1", "fp8e4nv": "e4m3", "fp8e5": "e5m2", "fp16": "f16", "bf16": "bf16", "fp32": "f32", "fp64": "f64"}
_MARKS = {"yes": "+", "no": "**no**", "refused": " "}
_TOP = """# Coverage of the language

Every public function of `triton.language` for every element type, on the CPU backend. A test runs each on
random inputs and compares it with fp64 or exact integers; the same test writes this page
(`pytest tests/coverage --accept-golden`).

- `+`: gives the right result.
- **no**: `UnsupportedOp` when the kernel is compiled, with the operation, the line and what to do instead.
- blank: Triton's own front end does not take this type here, on any device.
"""


def _columns(text: str, rows: Sequence[tuple[str, Sequence[str]]], first: str) -> list[str]:
    short = [_SHORT.get(dtype, dtype.replace("uint", "u").replace("int", "i")) for dtype in DTYPES]
    lines = ["", f"## {text}", "", f"| {first} | " + " | ".join(short) + " |", "|---|" + "---|" * len(DTYPES)]
    return lines + [f"| `{name}` | " + " | ".join(marks) + " |" for name, marks in rows]


def _names(title: str, names: Iterable[str]) -> list[str]:
    return ["", f"**{title}:** " + ", ".join(f"`{name}`" for name in sorted(names))]


def page(cases: Sequence[Case], states: dict[tuple[str, str], str]) -> str:
    """Text of the page.

    Args:
        states: "yes", "no" or "refused" of each row and dtype.
    """
    by_dtype = list(dict.fromkeys(case.name for case in cases if not case.once))
    others = [case for case in cases if case.once]
    marks = {name: [_MARKS[states[name, dtype]] for dtype in DTYPES] for name in by_dtype}
    sections = {"Functions": ("function", []), "Operators of tensors": ("operator", []), "Casts": ("from", [])}
    for name, row in marks.items():
        title = (
            "Casts"
            if name.startswith("cast to")
            else "Operators of tensors"
            if name.startswith("tensor.__")
            else "Functions"
        )
        sections[title][1].append((name, row))
    lines = _TOP.splitlines()
    for title, (first, rows) in sections.items():
        lines += _columns(title, rows if title == "Casts" else sorted(rows, key=lambda row: row[0].lower()), first)
    passed = {case.name for case in others if states[case.name, case.dtypes[0]] == "yes"}
    failed = {case.name for case in others} - passed
    passed, failed = passed - failed - set(by_dtype), failed
    lines += ["", "## Functions whose element type does not matter", "", "Run for one type each."]
    lines += _names("Right", (name for name in passed if not name.startswith("tensor.")))
    lines += _names(
        "Methods of tensors, which give what the function of their name gives",
        (n for n in passed if n.startswith("tensor.")),
    )
    lines += _names("`UnsupportedOp`", failed)
    lines += ["", "## Names that are no functions"]
    lines += _names("Types", TYPES)
    lines += _names(
        "Types of single GPU generations, which the front end takes from their backends only", FOREIGN_TYPES
    )
    lines += _names("Modules and numbers", MODULES | NUMBERS)
    lines += _names(
        "Facts about descriptors, known when a kernel is compiled", (f"tensor_descriptor.{n}" for n in DESCRIPTOR_FACTS)
    )
    lines += _names("Named by Triton but without a body", (f"tensor.{name}" for name in STUBS))
    return "\n".join(lines) + "\n"
