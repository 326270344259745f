"""Saved models: same bits in a new process, no pickle, damage is noticed, an interrupted save leaves nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from references import build, masks
from safetensors.torch import load_file, save_file

import tilewright
from tilewright.driver import artifact
from tilewright.errors import ArtifactError, InputError

_RUN = """
import sys
from safetensors.torch import load_file, save_file
from tilewright.driver.artifact import open_artifact
model = open_artifact(sys.argv[1])
out = model(**load_file(sys.argv[2]))
assert type(out).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions", type(out)
assert not model.changed_kernels, model.changed_kernels
save_file({k: v.contiguous() for k, v in out.items()}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[tilewright.CompiledModel, Path]:
    compiled = tilewright.compile(build("bert", 0))
    return compiled, artifact.save(compiled, tmp_path_factory.mktemp("artifact") / "bert")


def test_same_bits_in_a_new_process(saved: tuple[tilewright.CompiledModel, Path], tmp_path: Path) -> None:
    compiled, folder = saved
    mask = masks(4, 17, "right", torch.Generator().manual_seed(0))
    inputs = {"input_ids": torch.randint(3, 99, (4, 17)), "attention_mask": mask}
    save_file(inputs, tmp_path / "in.safetensors")
    command = [sys.executable, "-c", _RUN, str(folder), str(tmp_path / "in.safetensors"), str(tmp_path / "out")]
    subprocess.run(command, check=True)
    expected = compiled(**inputs)
    for name, value in load_file(tmp_path / "out").items():
        assert torch.equal(value, expected[name])


def test_no_code_and_no_pickle_inside(saved: tuple[tilewright.CompiledModel, Path]) -> None:
    files = [path for path in saved[1].rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".py"}
    assert all(path.parent.name == "kernels" for path in files if path.suffix == ".py")


def test_saving_again_replaces_but_never_foreign_files(
    saved: tuple[tilewright.CompiledModel, Path], tmp_path: Path
) -> None:
    compiled, folder = saved
    artifact.save(compiled, folder)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="other files"):
        artifact.save(compiled, tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["graph.json", "model.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_is_named(saved: tuple[tilewright.CompiledModel, Path], tmp_path: Path, name: str, damage: str) -> None:
    folder = artifact.save(saved[0], tmp_path / "copy")
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    with pytest.raises(ArtifactError):
        artifact.open_artifact(folder)


def test_a_graph_file_cannot_name_arbitrary_code(saved: tuple[tilewright.CompiledModel, Path]) -> None:
    from tilewright.ir.serialize import graph_from_json

    data = json.loads((saved[1] / "graph.json").read_text())[0]
    tensors = load_file(saved[1] / "model.safetensors")
    for change in ({"output": {"names": ["x"], "class": "os.system"}}, {"format": 99}):
        with pytest.raises(ArtifactError):
            graph_from_json({**data, **change}, tensors)
    call = next(row for row in data["graph"] if row["op"] == "call_module")
    call["body"][-2]["target"] = "posix.system"
    with pytest.raises(ArtifactError, match="posix"):
        graph_from_json(data, tensors)


def test_outputs_inside_outputs(tmp_path: Path) -> None:
    compiled = tilewright.compile(build("bert", 0))
    inputs = {"input_ids": torch.randint(3, 99, (2, 6)), "output_hidden_states": True}
    expected = compiled(**inputs)
    loaded = artifact.open_artifact(artifact.save(compiled, tmp_path / "m"))(**inputs)
    assert len(loaded.hidden_states) == len(expected.hidden_states) == 3
    for ours, theirs in zip(loaded.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(ours, theirs)


def test_output_structures_by_name() -> None:
    from tilewright.ir.serialize import output_builder

    one, two, three = torch.zeros(1), torch.ones(1), torch.ones(2)
    assert output_builder(None, ("output",))([one]) is one
    assert output_builder(None, ("output_0", "output_1.0", "output_1.1"))([one, two, three]) == (one, (two, three))
    assert output_builder(None, ("a", "b.0"))([one, two]) == {"a": one, "b": (two,)}


def test_a_call_it_was_not_compiled_for(saved: tuple[tilewright.CompiledModel, Path]) -> None:
    model = artifact.open_artifact(saved[1])
    with pytest.raises(InputError, match="not compiled for this call"):
        model(inputs_embeds=torch.randn(2, 3, 48))
