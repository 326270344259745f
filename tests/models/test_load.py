"""Models that a user names: what is wrong with a folder's files is said, and nothing else is raised."""

import json
from pathlib import Path
from typing import Any

import pytest

from tilewright.errors import InputError, OptionError
from tilewright.models import load

CONFIG = {
    "model_type": "gpt2", "vocab_size": 32, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", ["logging", "__version__", "pipeline", "NoSuchModel"])
def test_an_architecture_that_is_no_model(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG | {"architectures": [name]}))
    assert type(load.load_model(str(path)).model).__name__ == "GPT2Model"


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [(OSError(), InputError, "OSError"), (OptionError("no package", hint="install it"), OptionError, "install it")],
)
def test_errors_keep_what_they_say(
    raised: Exception, expected: type[Exception], message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    def fails(path: Path) -> Any:
        raise raised

    path = tmp_path / "model.gguf"
    path.touch()
    monkeypatch.setattr(load, "load_gguf", fails)
    with pytest.raises(expected, match=message):
        load.load_model(str(path))
