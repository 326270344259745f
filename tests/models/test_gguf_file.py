"""GGUF files are read as the library that wrote them reads them; a damaged one is an error that says where."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import SCALES, kind, random_blocks, tiny_model, write_model
from transformers import Qwen2Config

from tilewright.errors import GgufError
from tilewright.models.gguf.file import TYPES, open_gguf
from tilewright.models.gguf.model import load_gguf

VALUES = {
    "x.u8": 200, "x.i8": -100, "x.u16": 60000, "x.i16": -30000, "x.u32": 4000000000, "x.i32": -2000000000,
    "x.u64": 2**63, "x.i64": -(2**62), "x.f32": 0.5, "x.f64": 1e300, "x.yes": True, "x.no": False,
    "x.text": "Grüße, 世界",
}  # fmt: skip


def _writer(path: Path) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "test")
    adders: dict[str, Callable] = {
        "u8": writer.add_uint8, "i8": writer.add_int8, "u16": writer.add_uint16, "i16": writer.add_int16,
        "u32": writer.add_uint32, "i32": writer.add_int32, "u64": writer.add_uint64, "i64": writer.add_int64,
        "f32": writer.add_float32, "f64": writer.add_float64, "yes": writer.add_bool, "no": writer.add_bool,
        "text": writer.add_string,
    }  # fmt: skip
    for key, value in VALUES.items():
        adders[key[2:]](key, value)
    return writer


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with every type of value and a tensor of every format."""
    path = tmp_path_factory.mktemp("gguf") / "mixed.gguf"
    writer = _writer(path)
    writer.add_array("x.words", ["a", "", "ä" * 40])
    writer.add_array("x.numbers", [1, 2, 3])
    writer.add_array("x.reals", [0.5, -1.5])
    rng = np.random.default_rng(0)
    writer.add_tensor("one.axis", rng.standard_normal(7).astype(np.float32))
    writer.add_tensor("three.axes", rng.standard_normal((2, 3, 5)).astype(np.float32))
    for index, name in enumerate(TYPES.values()):
        if name in SCALES:
            writer.add_tensor(f"t.{name}", random_blocks(name, 1 + index % 3, 256, index), raw_dtype=kind(name))
        else:
            values = gguf.quantize(rng.standard_normal((1 + index % 3, 256)).astype(np.float32), kind(name))
            writer.add_tensor(f"t.{name}", values, raw_dtype=kind(name))
    _finish(writer)
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model: one layer."""
    config = Qwen2Config(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return write_model(tmp_path_factory.mktemp("gguf") / "model.gguf", tiny_model(config), "qwen2", "Q8_0")


def test_values_are_those_that_were_written(mixed: Path) -> None:
    metadata = open_gguf(mixed).metadata
    for key, value in VALUES.items():
        assert metadata[key] == value, key
        assert type(metadata[key]) is type(value)
    assert metadata["x.words"] == ("a", "", "ä" * 40)
    assert metadata["x.numbers"].tolist() == [1, 2, 3]
    assert metadata["x.reals"].tolist() == [0.5, -1.5]


def test_tensors_are_those_that_the_library_reads(mixed: Path) -> None:
    file = open_gguf(mixed)
    reader = gguf.GGUFReader(mixed)
    assert set(file.tensors) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        stored = file.stored(tensor.name)
        assert stored.format == tensor.tensor_type.name
        assert stored.shape == tuple(reversed(tensor.shape.tolist()))
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(file.dense(tensor.name), expected.view(stored.shape)), tensor.name


def test_tensors_share_the_mapped_file_and_outlive_it(mixed: Path) -> None:
    file = open_gguf(mixed)
    first, second = file.stored("t.Q4_K"), file.stored("t.Q8_0")
    assert first.data.untyped_storage().data_ptr() == second.data.untyped_storage().data_ptr()
    before = mixed.read_bytes()
    start, nbytes = file.tensors["t.Q4_K"].start, file.tensors["t.Q4_K"].nbytes
    del file
    assert first.data.numpy().tobytes() == before[start : start + nbytes]
    first.data.zero_()  # not what one should do, but the file is safe from it
    assert mixed.read_bytes() == before


@pytest.mark.parametrize("alignment", [8, 256])
def test_another_alignment(alignment: int, tmp_path: Path) -> None:
    path = tmp_path / "aligned.gguf"
    writer = _writer(path)
    writer.add_custom_alignment(alignment)
    values = np.arange(5, dtype=np.float32)
    writer.add_tensor("a", values)
    writer.add_tensor("b", values + 1)
    _finish(writer)
    file = open_gguf(path)
    assert file.tensors["b"].start % alignment == 0
    assert file.dense("b").tolist() == [1, 2, 3, 4, 5]


# Hand-made files: header, entries and tensors as bytes, and what the message must say.


def _text(text: bytes | str) -> bytes:
    content = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(content)) + content


def _entry(key: str, number: int, value: bytes) -> bytes:
    return _text(key) + struct.pack("<I", number) + value


def _tensor(name: str, shape: tuple[int, ...], number: int = 0, offset: int = 0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)


def _file(
    entries: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), data: int = 256, magic: bytes = b"GGUF",
    version: int = 3, counts: tuple[int, int] | None = None,
) -> bytes:  # fmt: skip
    header = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(entries))))
    content = b"".join((header, *entries, *tensors))
    return content + bytes(-len(content) % 32 + data)


ONE = _entry("a", 4, struct.pack("<I", 1))
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "magic": (_file(magic=b"GGML"), r"no GGUF file.*begins with b'GGML'"),
    "version 1": (_file(version=1), "version is 1; versions 2 and 3 are read"),
    "big-endian": (_file(version=3 << 24), "big-endian"),
    "tensor count": (_file(counts=(2**60, 0)), r"the number of tensors is 1152921504606846976.*hold fewer"),
    "entry count": (_file(counts=(0, 2**63)), "the number of metadata entries is 9223372036854775808"),
    "key length": (_file((struct.pack("<Q", 2**40) + b"a",)), r"byte 24, metadata, entry 0 of 1.*length of a key"),
    "key no text": (_file((_text(b"\xff\xfe") + bytes(8),)), "a key is no text"),
    "key twice": (_file((ONE, ONE)), r"key 'a'.*was there before"),
    "key empty": (_file((_entry("", 4, bytes(4)),)), "this key is empty"),
    "value type": (_file((_entry("a", 13, bytes(4)),)), r"key 'a'.*type 13; known are 0 to 12"),
    "truth value": (_file((_entry("a", 7, b"\x02"),)), r"key 'a'.*byte 2; 0 or 1 was expected"),
    "value no text": (_file((_entry("a", 8, _text(b"\xc3")),)), r"key 'a'.*no UTF-8"),
    "array length": (_file((_entry("a", 9, struct.pack("<IQ", 4, 2**62)),)), "the length of an array is 46116860"),
    "array of texts": (
        _file((_entry("a", 9, struct.pack("<IQ", 8, 3) + _text("x") + struct.pack("<Q", 10**6)),)),
        r"key 'a'.*string 1 of 3 goes beyond",
    ),
    "array depth": (
        _file((_entry("a", 9, struct.pack("<IQ", 9, 1) * 5 + struct.pack("<IQ", 4, 0)),)), "arrays too deep",
    ),
    "alignment": (_file((_entry("general.alignment", 4, struct.pack("<I", 24)),)), "it is 24; a power of two"),
    "alignment 0": (_file((_entry("general.alignment", 4, bytes(4)),)), "it is 0; a power of two"),
    "alignment 2": (_file((_entry("general.alignment", 4, struct.pack("<I", 2)),)), "a power of two from 8 on"),
    "alignment huge": (
        _file((_entry("general.alignment", 10, struct.pack("<Q", 2**63)),), (_tensor("t", (8,)),)), "ends early",
    ),
    "alignment type": (_file((_entry("general.alignment", 8, _text("32")),)), "it is '32'; a power of two"),
    "axes": (_file(tensors=(_tensor("t", (1,) * 5),)), r"tensor 't'.*5 axes; 1 to 4"),
    "no axes": (_file(tensors=(_tensor("t", ()),)), "0 axes"),
    "no elements": (_file(tensors=(_tensor("t", (32, 0)),)), "an axis has no elements"),
    "no name": (_file(tensors=(_tensor("", (32,)),)), "its name is empty"),
    "name twice": (_file(tensors=(_tensor("t", (8,)), _tensor("t", (8,), 0, 32))), "'t' was there before"),
    "known type": (
        _file(tensors=(_tensor("t", (256,), 21),)), r"tensor 't'.*IQ3_S \(type 21\).*F32, F16, Q4_0, Q5_0, Q8_0, Q4_K",
    ),
    "unknown type": (_file(tensors=(_tensor("t", (256,), 77),)), "type 77 is unknown"),
    "rows of a block": (_file(tensors=(_tensor("t", (128,), 12),)), "a row has 128 elements; blocks of Q4_K have 256"),
    "offset": (_file(tensors=(_tensor("t", (8,), 0, 8),)), "its offset is 8, no multiple of 32"),
    "offset beyond": (_file(tensors=(_tensor("t", (8,), 0, 2**62),)), "beyond the end of the file"),
    "too large": (_file(tensors=(_tensor("t", (2**62, 2**62, 2**62, 2**62)),)), "beyond the end of the file"),
    "one byte short": (_file(tensors=(_tensor("t", (64,)),), data=255), "ends 1 bytes beyond the end of the file"),
    "shared data": (_file(tensors=(_tensor("t", (9,)), _tensor("u", (8,), 0, 32))), "begins inside 't'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said_with_its_place(case: str, tmp_path: Path) -> None:
    content, message = BROKEN[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufError, match=f"(?s){message}") as raised:
        open_gguf(path)
    assert "broken.gguf" in str(raised.value.where)
    assert raised.value.hint


def test_a_file_of_nothing_but_a_header(tmp_path: Path) -> None:
    path = tmp_path / "header.gguf"
    path.write_bytes(_file(data=0)[:24])
    assert not open_gguf(path).tensors


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="No such file"):
        open_gguf(tmp_path / "nothing.gguf")
    with pytest.raises(GgufError, match="directory"):
        open_gguf(tmp_path)


def test_cut_off_anywhere_is_an_error(mixed: Path, tmp_path: Path) -> None:
    content = mixed.read_bytes()
    path = tmp_path / "cut.gguf"
    first = min(tensor.start for tensor in open_gguf(mixed).tensors.values())
    last = max(tensor.start + tensor.nbytes for tensor in open_gguf(mixed).tensors.values())
    path.write_bytes(content)
    for size in sorted({*range(first + 1), *range(first, last, 97), last - 1}, reverse=True):
        os.truncate(path, size)
        with pytest.raises(GgufError):
            open_gguf(path)


def _damage(content: bytes, end: int, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        changed[rng.integers(0, end)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(0, 256)])
    return bytes(changed)


def test_random_bytes_never_raise_anything_else(mixed: Path, tmp_path: Path) -> None:
    content = mixed.read_bytes()
    first = min(tensor.start for tensor in open_gguf(mixed).tensors.values())
    rng = np.random.default_rng(1)
    path = tmp_path / "changed.gguf"
    refused = 0
    for _ in range(1000):
        path.write_bytes(_damage(content, first, rng))
        try:
            file = open_gguf(path)
        except GgufError:
            refused += 1
        else:
            for name in file.tensors:
                file.stored(name)
    assert 100 < refused < 1000


@pytest.mark.filterwarnings("ignore")
def test_random_bytes_in_a_model_never_raise_anything_else(model_file: Path, tmp_path: Path) -> None:
    content = model_file.read_bytes()
    first = min(tensor.start for tensor in open_gguf(model_file).tensors.values())
    rng = np.random.default_rng(2)
    path = tmp_path / "changed.gguf"
    opened = 0
    for _ in range(150):
        path.write_bytes(_damage(content, first, rng))
        try:
            load_gguf(path)
        except GgufError:
            continue
        opened += 1
    assert 0 < opened < 150
