"""The text of one kernel of each family, as a reader sees it: a change of it is a decision, not an accident."""

from pathlib import Path

import pytest
from tests.golden.kernels import FAMILIES

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("family", FAMILIES)
def test_kernel_text(family: str, request: pytest.FixtureRequest) -> None:
    steps = FAMILIES[family]()
    found = "\n\n".join(
        f"# grid {step.grid}, constants {step.kernel.constexprs}\n{step.kernel.readable}" for step in steps
    )
    path = FOLDER / f"{family}.py.txt"
    if request.config.getoption("--accept-golden"):
        path.write_text(found)
    assert path.exists(), f"no golden file {path.name}; write it with pytest --accept-golden and read it"
    assert found == path.read_text(), f"{path.name} differs; if that is meant, run pytest --accept-golden"
