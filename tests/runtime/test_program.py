"""Programs run as their steps say, for any sizes, from any thread, and stay usable after errors."""

import random
import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from program_specs import COUNT, Builder, built
from torch import Tensor

from tilewright.codegen.cpu import launch
from tilewright.errors import InputError, TilewrightError
from tilewright.ir.program import Choice, KernelStep, Pointer, ReadTokens, Scalar, Storage, VendorLinear, View
from tilewright.ir.sizes import BATCH, SEQ, TOKENS
from tilewright.runtime.bound import Workspace
from tilewright.runtime.program import Program
from tilewright.runtime.schedule import STEP
from tilewright.runtime.weights import PackedLinear

BIND = [(BATCH, 0, 0), (SEQ, 0, 1)]
Reference = Callable[[dict[int, Tensor]], Tensor]


def pack(x: Tensor, mask: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor]:
    return (x[mask != 0],)


def unpack(x: Tensor, mask: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor]:
    full = x.new_zeros((*mask.shape, x.shape[1]))
    full[mask != 0] = x
    return (full,)


class Packed:
    """A program over packed rows of a mask [B, S] and x [B, S, 8], with a reference beside every step."""

    def __init__(self) -> None:
        b = self.builder = Builder()
        self.mask = b.value(Storage.INPUT, (BATCH, SEQ), torch.int64)
        self.x = b.value(Storage.INPUT, (BATCH, SEQ, 8))
        tokens = b.value(Storage.ARENA, (1,), torch.int32)
        arguments = (Pointer(self.mask), Pointer(tokens), Scalar(BATCH * SEQ))
        b.steps.append(KernelStep(COUNT, arguments, (1, 1, 1), (self.mask.value,), (tokens.value,), ("count",)))
        b.steps.append(ReadTokens(tokens, TOKENS, BATCH * SEQ, (tokens.value,)))
        self.references: list[tuple[int, Reference]] = []
        packed = self.value(8)
        b.eager(pack, [self.x, self.mask], [packed])
        self.references.append((packed.value, lambda v: v[self.x.value][v[self.mask.value] != 0]))
        self.rows = [packed]

    def value(self, width: int) -> View:
        return self.builder.value(Storage.ARENA, (TOKENS, width))

    def add(self, out: View, reference: Reference) -> None:
        self.rows.append(out)
        self.references.append((out.value, reference))

    def scale(self, x: View, factor: float) -> None:
        out = self.value(int(x.shape[1]))
        self.builder.scale(x, out, factor)
        self.add(out, lambda v: v[x.value] * factor)

    def sum(self, x: View, y: View) -> None:
        out = self.value(int(x.shape[1]))
        self.builder.eager(lambda a, b, sizes: (a + b,), [x, y], [out])
        self.add(out, lambda v: v[x.value] + v[y.value])

    def linear(self, x: View, width: int, layout: str, *, bias: bool, table: int | None) -> None:
        """A vendor linear, or a table of it and of a linear into scratch followed by a copy."""
        b, k = self.builder, int(x.shape[1])
        weight = torch.randn(width, k)
        w, offset = b.weight(weight, layout), b.weight(torch.randn(width)) if bias else None
        out = self.value(width)
        shift = b.weights[b.values[offset.value].name].tensor if offset is not None else torch.zeros(width)
        self.add(out, lambda v: v[x.value] @ weight.double().t() + shift.double())
        reads = (x.value, w.value, *([offset.value] if offset is not None else []))
        index = None if offset is None else offset.value
        direct = VendorLinear(x, w.value, index, out, reads, (out.value,), ("linear",))
        if table is None:
            b.steps.append(direct)
            return
        scratch = self.value(width)
        first = VendorLinear(x, w.value, index, scratch, reads, (scratch.value,), ("linear",))
        second = b.scale(scratch, out, 1.0)
        b.steps.pop()
        entries = ((table, "direct", (direct,)), (None, "two", (first, second)))
        b.steps.append(Choice(TOKENS, entries, reads, (out.value,), ("table",)))

    def finish(self, keep: View) -> tuple[Program, Callable[[Tensor, Tensor], Tensor]]:
        """The program returns ``keep`` unpacked; the reference computes the same in fp64."""
        width = int(keep.shape[1])
        out = self.builder.value(Storage.OUTPUT, (BATCH, SEQ, width))
        self.builder.eager(unpack, [keep, self.mask], [out])

        def reference(mask: Tensor, x: Tensor) -> Tensor:
            values = {self.mask.value: mask, self.x.value: x.double()}
            for index, compute in self.references:
                values[index] = compute(values)
            return unpack(values[keep.value], mask, ())[0]

        return self.builder.program(BIND, [out]), reference


def random_program(seed: int) -> tuple[Program, Callable[[Tensor, Tensor], Tensor]]:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    p = Packed()
    for _ in range(draw.randint(3, 14)):
        x = draw.choice(p.rows[-5:])
        kind = draw.choice(("scale", "sum", "linear", "linear"))
        if kind == "scale":
            p.scale(x, draw.choice((0.5, -1.25)))
        elif kind == "sum":
            p.sum(x, draw.choice([y for y in p.rows if y.shape == x.shape]))
        else:
            layout, table = draw.choice(("vendor", "as_is")), draw.choice((None, 5, 20))
            p.linear(x, draw.choice((8, 8, 24)), layout, bias=draw.random() < 0.5, table=table)
    return p.finish(p.rows[-1])


def random_batch(draw: random.Random) -> tuple[Tensor, Tensor]:
    batch, length = draw.choice(((1, 1), (3, 7), (4, 16), (2, 1), (0, 3)))
    mask = torch.randint(0, 2, (batch, length))
    return mask, torch.randn(batch, length, 8)


def assert_close(got: Tensor, expected: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5 * scale)


def counted(b: Builder) -> View:
    """Adds an input mask [B, S], the count of its tokens and the step that reads it."""
    mask, tokens = b.value(Storage.INPUT, (BATCH, SEQ), torch.int64), b.value(Storage.ARENA, (1,), torch.int32)
    arguments = (Pointer(mask), Pointer(tokens), Scalar(BATCH * SEQ))
    b.steps.append(KernelStep(COUNT, arguments, (1, 1, 1), (mask.value,), (tokens.value,)))
    b.steps.append(ReadTokens(tokens, TOKENS, BATCH * SEQ, (tokens.value,)))
    return mask


@pytest.mark.parametrize("seed", range(30))
def test_random_programs_agree_with_their_steps_in_fp64(seed: int) -> None:
    program, reference = random_program(seed)
    draw = random.Random(seed)
    batches = [random_batch(draw) for _ in range(4)]
    # The second round runs on kept plans, after the arena has grown.
    for mask, x in (*batches, *batches):
        (got,) = program(mask, x)
        assert_close(got, reference(mask, x))
    assert program.stats.calls == 8
    assert program.stats.rows_computed == 2 * sum(int((mask != 0).sum()) for mask, _ in batches)
    assert program.stats.rows_padded == 2 * sum(mask.numel() for mask, _ in batches)


def test_a_batch_without_tokens() -> None:
    program, _ = random_program(1)
    full = torch.ones(2, 5, dtype=torch.int64)
    program(full, torch.randn(2, 5, 8))
    (got,) = program(torch.zeros_like(full), torch.full((2, 5, 8), float("nan")))
    assert got.shape[:2] == (2, 5)
    assert not got.any()
    (none,) = program(full[:0], torch.randn(0, 5, 8))
    assert none.shape[:2] == (0, 5)


def test_outputs_that_no_step_reaches_are_zero_for_empty_batches() -> None:
    b = Builder()
    counted(b)
    h, out = b.value(Storage.ARENA, (TOKENS, 4)), b.value(Storage.OUTPUT, (BATCH, 4))
    b.eager(lambda sizes: (torch.ones(sizes[2], 4),), [], [h])
    b.scale(View(h.value, (TOKENS, 4), (4, 1)), out, 2.0)
    program = b.program(BIND, [out])
    for _ in range(3):
        assert torch.equal(program(torch.ones(3, 1, dtype=torch.int64))[0], torch.full((3, 4), 2.0))
        assert torch.equal(program(torch.zeros(3, 1, dtype=torch.int64))[0], torch.zeros(3, 4))


def test_planned_values_that_no_step_reaches_are_zero_for_empty_batches() -> None:
    b = Builder()
    counted(b)
    h, out = b.value(Storage.ARENA, (1, 4)), b.value(Storage.OUTPUT, (1, 4))
    ones = b.weight(torch.ones(1, 4))
    b.scale(View(ones.value, (TOKENS, 4), (4, 1)), h, 2.0)
    b.scale(h, out, 1.0)
    program = b.program(BIND, [out])
    for count in (1, 0, 1, 0):
        assert torch.equal(program(torch.full((1, 1), count))[0], torch.full((1, 4), 2.0 * count))


def test_values_of_the_first_phase_last_through_the_second() -> None:
    b = Builder()
    x, early, linear = (b.value(s, (BATCH, 8)) for s in (Storage.INPUT, Storage.ARENA, Storage.ARENA))
    weight = torch.randn(8, 8)
    w = b.weight(weight, "vendor")
    b.scale(x, early, 2.0)
    b.steps.append(VendorLinear(x, w.value, None, linear, (x.value, w.value), (linear.value,)))
    counted(b)
    big, late = b.value(Storage.ARENA, (TOKENS, 8)), b.value(Storage.ARENA, (BATCH, 8))
    out = b.value(Storage.OUTPUT, (BATCH, 8))
    b.eager(lambda sizes: (torch.full((sizes[2], 8), 7.0),), [], [big])
    b.scale(early, late, 0.5)
    b.eager(lambda p, q, r, sizes: (p + q + r[:1],), [late, linear, big], [out])
    program = b.program([(BATCH, 1, 0), (SEQ, 1, 1)], [out])
    for batch, length in ((2, 3), (2, 30), (5, 2), (2, 3)):
        given = torch.randn(batch, 8)
        (got,) = program(given, torch.ones(batch, length, dtype=torch.int64))
        torch.testing.assert_close(got, given + given @ weight.t() + 7)


def test_a_plan_is_dropped_when_its_arena_moves() -> None:
    program, _ = random_program(7)
    workspace = Workspace(program._phases)
    first = workspace.bind(0, (1, 2), None)
    small = workspace.bind(1, (1, 2, 2), first)
    assert workspace.bind(1, (1, 2, 2), first) is small
    workspace.bind(1, (64, 512, 64 * 512), workspace.bind(0, (64, 512), None))
    assert workspace.bind(1, (1, 2, 2), first) is not small


def test_vendor_results_are_dropped_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    original = PackedLinear.apply

    def apply(self: PackedLinear, x: Tensor, bias: Tensor | None) -> Tensor:
        result = original(self, x, bias)
        made.append(weakref.ref(result))
        return result

    monkeypatch.setattr(PackedLinear, "apply", apply)
    p = Packed()
    for _ in range(3):
        p.linear(p.rows[-1], 8, "vendor", bias=False, table=None)
        p.scale(p.rows[-1], 1.0)
    alive: list[int] = []

    def count_alive(t: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor]:
        alive.append(sum(result() is not None for result in made))
        return (t,)

    p.builder.eager(count_alive, p.rows[-1:], [p.value(8)])
    program, reference = p.finish(p.rows[-1])
    mask, x = torch.ones(2, 3, dtype=torch.int64), torch.randn(2, 3, 8)
    assert_close(program(mask, x)[0], reference(mask, x))
    assert len(made) == 3
    assert alive == [0]


def test_vendor_results_as_outputs_and_in_parts_of_values() -> None:
    b = Builder((BATCH, SEQ))
    x, whole = b.value(Storage.INPUT, (BATCH, SEQ, 8)), b.value(Storage.OUTPUT, (BATCH, SEQ, 6))
    wide, part = b.value(Storage.ARENA, (BATCH * SEQ, 12)), b.value(Storage.OUTPUT, (BATCH * SEQ, 6))
    weight = torch.randn(6, 8)
    w = b.weight(weight, "vendor")
    rows = View(x.value, (BATCH * SEQ, 8), (8, 1))
    half = View(wide.value, (BATCH * SEQ, 6), (12, 1), 6)
    for out in (View(whole.value, (BATCH * SEQ, 6), (6, 1)), half):
        b.steps.append(VendorLinear(rows, w.value, None, out, (x.value, w.value), (out.value,)))
    b.eager(lambda t, sizes: (t,), [half], [part])
    program = b.program(BIND, [whole, part])
    given = torch.randn(2, 3, 8)
    got, also = program(given)
    torch.testing.assert_close(got, given @ weight.t())
    torch.testing.assert_close(also.view(2, 3, 6), given @ weight.t())


def test_outputs_are_fresh_and_inputs_and_weights_may_be_returned() -> None:
    b = Builder((BATCH,))
    x, out = b.value(Storage.INPUT, (BATCH, 8)), b.value(Storage.OUTPUT, (BATCH, 8))
    weight = torch.randn(8, 8)
    w = b.weight(weight, "vendor")
    b.steps.append(VendorLinear(x, w.value, None, out, (x.value, w.value), (out.value,)))
    program = b.program([(BATCH, 0, 0)], [out, x, w, out])
    first = torch.randn(3, 8)
    got = program(first)
    kept = got[0].clone()
    assert got[1] is first
    assert got[2] is weight
    assert got[3] is got[0]
    program(torch.randn(3, 8))
    assert torch.equal(got[0], kept)
    torch.testing.assert_close(kept, first @ weight.t())


def test_kernels_get_aligned_inputs() -> None:
    b = Builder((BATCH,))
    x, out = b.value(Storage.INPUT, (BATCH,)), b.value(Storage.OUTPUT, (BATCH,))
    b.eager(lambda t, sizes: (t + t.data_ptr() % 16,), [x], [out])
    program = b.program([(BATCH, 0, 0)], [out])
    given = torch.randn(9)
    assert torch.equal(program(given[1:])[0], given[1:])


def test_inference_mode_and_gradients() -> None:
    program, reference = random_program(3)
    mask, flat = torch.ones(2, 3, dtype=torch.int64), torch.randn(49)
    x = flat[1:].view(2, 3, 8)
    for context in (torch.inference_mode(True), torch.inference_mode(False), torch.enable_grad()):
        with context:
            assert_close(program(mask, x.clone().requires_grad_())[0], reference(mask, x))
            (got,) = program(mask, x)
        assert not got.requires_grad
        assert_close(got.clone(), reference(mask, x))


def test_an_error_in_a_step_leaves_the_program_usable() -> None:
    b = Builder((BATCH,))
    x, h, out = (b.value(s, (BATCH, 4)) for s in (Storage.INPUT, Storage.ARENA, Storage.OUTPUT))
    failures: list[BaseException] = []

    def maybe(t: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor]:
        if failures:
            raise failures.pop()
        return (t + 1,)

    b.scale(x, h, 2.0)
    b.eager(maybe, [h], [out])
    program = b.program([(BATCH, 0, 0)], [out])
    given = torch.randn(3, 4)
    for error in (ValueError("no"), KeyboardInterrupt()):
        failures.append(error)
        with pytest.raises(type(error)):
            program(given)
        torch.testing.assert_close(program(given)[0], given * 2 + 1)
    assert program.stats.calls == 2


def test_calls_from_threads_and_from_inside_a_step() -> None:
    inner, reference = random_program(5)
    mask, x = torch.ones(3, 4, dtype=torch.int64), torch.randn(3, 4, 8)
    expected = reference(mask, x)
    b = Builder((BATCH,))
    given = b.value(Storage.INPUT, (BATCH, 4), torch.int64)
    out = b.value(Storage.OUTPUT, tuple(expected.shape))
    b.eager(lambda m, sizes: (inner(mask, x)[0],), [given], [out])
    outer = b.program([(BATCH, 0, 0)], [out])
    wrong: list[str] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(15):
            own_mask, own_x = random_batch(draw)
            try:
                assert_close(inner(own_mask, own_x)[0], reference(own_mask, own_x))
                assert_close(outer(mask)[0], expected)
            except AssertionError as error:
                wrong.append(str(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert inner.stats.calls == 4 * 15 * 2


@pytest.mark.parametrize(
    ("mask", "x", "says"),
    [
        (torch.ones(2, 3), torch.randn(2, 3, 8), "int64"),
        (torch.ones(2, 3, 1, dtype=torch.int64), torch.randn(2, 3, 8), "2 dimensions"),
        (torch.ones(2, 4, dtype=torch.int64), torch.randn(2, 3, 8), "expected"),
        (torch.ones(2, 3, dtype=torch.int64), torch.randn(2, 3, 9), "expected"),
        (torch.ones(2, 3, dtype=torch.int64), torch.randn(8, 3, 2).transpose(0, 2), "not contiguous"),
        (torch.ones(2, 3, dtype=torch.int64), None, "NoneType"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(mask: Tensor, x: Tensor, says: str) -> None:
    program, reference = random_program(2)
    with pytest.raises(InputError, match=says):
        program(mask, x)
    with pytest.raises(InputError, match="number of inputs"):
        program(mask)
    good = torch.ones(1, 2, dtype=torch.int64), torch.randn(1, 2, 8)
    assert_close(program(*good)[0], reference(*good))


def test_sizes_beyond_32_bits_are_refused() -> None:
    b = Builder((BATCH,))
    x, out = b.value(Storage.INPUT, (BATCH, 0)), b.value(Storage.OUTPUT, (1, 4))
    wide = View(x.value, (BATCH * 2**20, 4), (4, 1))
    b.scale(wide, View(out.value, (1, 4), (4, 1)), 1.0)
    program = b.program([(BATCH, 0, 0)], [out])
    with pytest.raises(InputError, match="32 bits"):
        program(torch.empty(4096, 0))


def test_memory_is_kept_and_released() -> None:
    program, _ = random_program(7)
    mask, x = torch.ones(4, 16, dtype=torch.int64), torch.randn(4, 16, 8)
    assert program.allocated_bytes == 0
    program(mask, x)
    kept = program.allocated_bytes
    assert kept >= program.planned_bytes(4, 16, 64) > 0
    assert program.planned_bytes(4, 16, 64) <= program.bytes_without_reuse(4, 16, 64)
    program(mask[:1], x[:1])
    assert program.allocated_bytes == kept
    before = program(mask, x)[0]
    program.release_memory()
    assert program.allocated_bytes == 0
    assert torch.equal(program(mask, x)[0], before)


def test_profile_names_every_step() -> None:
    p = Packed()
    p.scale(p.rows[0], 2.0)
    p.linear(p.rows[-1], 8, "vendor", bias=True, table=None)
    p.scale(p.rows[-1], 2.0)
    program, _ = p.finish(p.rows[-1])
    timeline = program.profile(torch.ones(2, 3, dtype=torch.int64), torch.randn(2, 3, 8))
    names = [name for name, _ in timeline]
    kernels = ["count", "eager(by_hand)", "scale_rows", "vendor_linear(linear)", "scale_rows", "eager(by_hand)"]
    assert names == kernels
    assert all(seconds > 0 for _, seconds in timeline)
    assert (program.stats.kernels_launched, program.stats.vendor_calls, program.stats.eager_steps) == (3, 1, 2)


def test_table_bounds_are_inclusive() -> None:
    p = Packed()
    p.linear(p.rows[0], 8, "vendor", bias=False, table=5)
    program, _ = p.finish(p.rows[-1])
    for tokens, kernels in ((5, 1), (6, 2), (4, 1)):
        names = [n for n, _ in program.profile(torch.ones(1, tokens, dtype=torch.int64), torch.randn(1, tokens, 8))]
        assert names.count("scale_rows") + names.count("count") == kernels


def test_step_records_are_laid_out_as_the_launcher_reads_them() -> None:
    native = launch.Step
    assert STEP.itemsize == np.dtype(native).itemsize
    theirs = [getattr(native, name).offset for name in ("fn", "args", "grid_x", "flags", "chunk")]
    assert [STEP.fields[name][1] for name in STEP.names] == theirs  # type: ignore[index, union-attr]


def broken(kind: str) -> Program:
    b = Builder((BATCH,))
    x, h, out = (b.value(s, (BATCH, 4)) for s in (Storage.INPUT, Storage.ARENA, Storage.OUTPUT))
    if kind == "read before write":
        b.scale(h, out, 1.0)
    elif kind == "writes an input":
        b.scale(x, x, 1.0)
    elif kind == "unknown size":
        b.scale(View(x.value, (TOKENS, 4), (4, 1)), out, 1.0)
    elif kind == "arguments":
        step = b.scale(x, out, 1.0)
        b.steps[-1] = KernelStep(step.kernel, step.args[:3], step.grid, step.reads, step.writes)
    elif kind == "pointer for a number":
        step = b.scale(x, out, 1.0)
        b.steps[-1] = KernelStep(step.kernel, (*step.args[:3], Pointer(x)), step.grid, step.reads, step.writes)
    elif kind == "hidden view":
        step = b.scale(x, out, 1.0)
        b.steps[-1] = KernelStep(step.kernel, step.args, step.grid, (), step.writes)
    elif kind == "not returned":
        b.scale(x, h, 1.0)
    elif kind == "bounds":
        step = b.scale(x, out, 1.0)
        b.steps[-1] = Choice(BATCH, ((4, "a", (step,)),), (x.value,), (out.value,))
    elif kind == "entry":
        step = b.scale(x, h, 1.0)
        b.steps[-1] = Choice(BATCH, ((None, "a", (step,)),), (x.value,), (out.value,))
    elif kind == "vendor weight":
        b.scale(b.weight(torch.randn(4, 4), "vendor"), out, 1.0)
    return b.program([(BATCH, 0, 0)], [h if kind == "returned arena" else out])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("read before write", "no step before it writes"),
        ("writes an input", "an input or a weight"),
        ("unknown size", "not known yet"),
        ("arguments", "3 arguments to a kernel that takes 4"),
        ("pointer for a number", "'scale' is of type fp32"),
        ("hidden view", "neither among its reads"),
        ("not returned", "no step writes it"),
        ("returned arena", "memory that is reused"),
        ("bounds", "do not cover"),
        ("entry", "does not write"),
        ("vendor weight", "own form"),
    ],
)
def test_a_program_that_contradicts_itself_is_not_loaded(kind: str, says: str) -> None:
    with pytest.raises(TilewrightError, match=says):
        broken(kind)


def test_kernels_have_to_be_built() -> None:
    b = Builder((BATCH,))
    x, out = b.value(Storage.INPUT, (BATCH, 4)), b.value(Storage.OUTPUT, (BATCH, 4))
    b.scale(x, out, 1.0)
    assert built()
    with pytest.raises(TilewrightError, match="not built"):
        Program(b.spec([(BATCH, 0, 0)], [out]), {}, launch.launcher())
