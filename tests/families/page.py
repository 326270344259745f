"""The page ``docs/encoders.md``: what becomes of each family with each head."""

import re
from dataclasses import dataclass
from pathlib import Path

from tests.families.models import FAMILIES, HEADS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "encoders.md"
_TOP = """# Encoders

What Tilewright does with each family of encoders and each head. A test compiles a tiny model for every cell, compares
it with eager in fp64 on right-padded and left-padded batches, masks with holes and empty rows, and writes this page
(`pytest tests/families --accept-golden`).

- **packed**: the whole model works on real tokens only; no op runs eager.
- **padded**: the model is compiled and works on all places of the padded batch, for the reason below.
- **eager**: the model, or the part named below, runs as it was.
- blank: transformers has no such class, or it has a decoder.

`base` is the model without a head, with its pooler where it has one; of T5 and BART it is the encoder.

"""
_REASONS = "\n## Reasons\n\n"


@dataclass(frozen=True)
class Row:
    """A family's cells in the order of ``HEADS``, and (heads, reason) for those that are not packed."""

    cells: tuple[str, ...]
    reasons: tuple[tuple[str, str], ...]


def written() -> dict[str, Row]:
    """The rows of the page as it is."""
    text = PAGE.read_text() if PAGE.exists() else ""
    rows = {}
    for family in FAMILIES:
        line = re.search(rf"^\| {re.escape(family)} \|(.*)\|$", text, re.MULTILINE)
        if line:
            reasons = re.findall(rf"^- {re.escape(family)}, (.*?): (.*)$", text, re.MULTILINE)
            rows[family] = Row(tuple(cell.strip() for cell in line[1].split("|")), tuple(reasons))
    return rows


def write(rows: dict[str, Row]) -> None:
    """Writes the page with these rows."""
    lines = [f"| | {' | '.join(HEADS)} |", f"| --- |{' --- |' * len(HEADS)}"]
    lines += [f"| {family} | {' | '.join(rows[family].cells)} |" for family in FAMILIES if family in rows]
    reasons = [
        f"- {family}, {heads}: {why}" for family in FAMILIES if family in rows for heads, why in rows[family].reasons
    ]
    PAGE.write_text(_TOP + "\n".join(lines) + "\n" + _REASONS + "\n".join(reasons) + "\n")
