"""The folder rules: what is packaged, who may import whom, where the environment is read."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAPPED = ("models", "passes", "codegen", "runtime")
COMMON = {"tilewright.ir", "tilewright.ops", "tilewright.settings", "tilewright.errors"}


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"no Python files in {folder}"
    return found


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_package_folder_is_listed() -> None:
    mapping = _project()["tool"]["setuptools"]["package-dir"]
    assert sorted(mapping) == sorted(_project()["tool"]["setuptools"]["packages"])
    folders = [ROOT / "src" / "tilewright", *(ROOT / name for name in MAPPED)]
    on_disk = {str(init.parent.relative_to(ROOT)) for folder in folders for init in folder.rglob("__init__.py")}
    assert on_disk == set(mapping.values())


@pytest.mark.parametrize("folder", MAPPED)
def test_stages_do_not_import_one_another(folder: str) -> None:
    for path in _sources(folder):
        for name in _imports(path):
            if name.startswith("tilewright"):
                allowed = {f"tilewright.{folder}", *COMMON}
                assert any(name == a or name.startswith(a + ".") for a in allowed), f"{path} imports {name}"


@pytest.mark.parametrize("folder", ["src/tilewright/ir", "src/tilewright/ops"])
def test_the_core_imports_no_stage(folder: str) -> None:
    stages = tuple(f"tilewright.{name}" for name in (*MAPPED, "driver", "cli"))
    for path in _sources(folder):
        assert not [name for name in _imports(path) if name.startswith(stages)], path


@pytest.mark.parametrize("folder", ["src", *MAPPED, "tests", "benchmarks"])
def test_no_import_by_folder_name(folder: str) -> None:
    for path in _sources(folder):
        wrong = [name for name in _imports(path) if name.split(".")[0] in MAPPED]
        assert not wrong, f"{path} imports {wrong}: write tilewright.{wrong[0]}"


@pytest.mark.parametrize("folder", ["src", *MAPPED])
def test_only_settings_reads_the_environment(folder: str) -> None:
    for path in _sources(folder):
        if path == ROOT / "src" / "tilewright" / "settings.py":
            continue
        reads = [n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)]
        assert not {"environ", "getenv"} & set(reads), path


def test_bare_import_is_light() -> None:
    code = (
        "import sys, tilewright; print([m for m in ('torch', 'triton', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_public_names_resolve() -> None:
    import tilewright

    for name in tilewright.__all__:
        assert getattr(tilewright, name) is not None
    with pytest.raises(AttributeError, match="public names"):
        tilewright.no_such_name  # noqa: B018


def test_settings_are_documented() -> None:
    from tilewright import settings

    text = (ROOT / "docs" / "settings.md").read_text()
    for setting in settings.TABLE:
        assert f"`{setting.env}`" in text, f"docs/settings.md does not name {setting.env}"
        assert setting.help in text, f"docs/settings.md has another help for {setting.env}"
