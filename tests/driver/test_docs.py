"""The script behind docs/design.md runs, and the page shows what it prints."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_follows_the_model_as_the_script_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("follow_one_model", DOCS / "follow_one_model.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main([])
    # Hashes in kernel names change with any kernel's text; the page need not follow.
    printed = re.sub(r"_[0-9a-f]{8}\b", "", capsys.readouterr().out)
    page = (DOCS / "design.md").read_text().partition("## One tiny model")[2]
    shown = [line.strip().rstrip("…") for line in page.splitlines() if line.startswith("    ")]
    shown = [re.sub(r"_[0-9a-f]{8}\b", "", line) for line in shown if line not in ("", "...")]
    assert len(shown) > 100
    missing = [line for line in shown if line[:90] not in printed and not line.startswith("python ")]
    assert not missing
