"""A page of the documentation that a test writes: a table with a row for each family, and reasons below it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
_REASONS = "\n## Reasons\n\n"
_NUMBER = re.compile(r"\d+(\.\d+)?")


@dataclass(frozen=True)
class Row:
    """A family's cells in the order of the columns, and (columns, reason) for those that need one."""

    cells: tuple[str, ...]
    reasons: tuple[tuple[str, str], ...] = ()

    def agrees(self, other: "Row | None") -> bool:
        """Whether both say the same, whatever their figures: these are of the run that wrote the page."""
        return other is not None and self._words() == other._words()

    def _words(self) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
        return tuple(_NUMBER.sub("#", cell) for cell in self.cells), self.reasons


@dataclass(frozen=True)
class TablePage:
    """The page.

    Attributes:
        path: its file.
        top: text above the table.
        columns: their names.
        families: rows, in order.
    """

    path: Path
    top: str
    columns: Sequence[str]
    families: Sequence[str]

    def written(self) -> dict[str, Row]:
        """The rows of the page as it is."""
        text = self.path.read_text() if self.path.exists() else ""
        rows = {}
        for family in self.families:
            line = re.search(rf"^\| {re.escape(family)} \|(.*)\|$", text, re.MULTILINE)
            if line:
                reasons = re.findall(rf"^- {re.escape(family)}, (.*?): (.*)$", text, re.MULTILINE)
                rows[family] = Row(tuple(cell.strip() for cell in line[1].split("|")), tuple(reasons))
        return rows

    def write(self, rows: dict[str, Row]) -> None:
        """Writes the page with these rows."""
        shown = {family: rows[family] for family in self.families if family in rows}
        lines = [f"| | {' | '.join(self.columns)} |", f"| --- |{' --- |' * len(self.columns)}"]
        lines += [f"| {family} | {' | '.join(row.cells)} |" for family, row in shown.items()]
        reasons = [f"- {family}, {where}: {why}" for family, row in shown.items() for where, why in row.reasons]
        why = _REASONS + "\n".join(reasons) + "\n" if reasons else ""
        self.path.write_text(self.top + "\n".join(lines) + "\n" + why)
