"""Builds kernels from source text for the project's own runtime, without live tensors, and keeps them on disk.

A kernel that is already in the cache directory is loaded without Triton: its key names everything its object
code depends on, so neither the front end nor LLVM's optimizer runs, and triton is not even imported.
"""

import hashlib
import tempfile
import threading
import types
import weakref
from functools import cache
from pathlib import Path
from typing import Any

from tilewright import settings
from tilewright.codegen.cpu import jit, store
from tilewright.codegen.cpu.target import CpuTarget
from tilewright.codegen.cpu.version import front_end_version, toolchain_version
from tilewright.errors import CodegenError, Where
from tilewright.ir.kernels import BuiltKernel, KernelSource

_loaded: weakref.WeakValueDictionary[str, jit.Code] = weakref.WeakValueDictionary()
# Triton's front end is not meant to be entered by two threads, and one build per kernel is enough.
_build_lock = threading.Lock()


def build(source: KernelSource) -> BuiltKernel:
    """A kernel as native code of this machine, from the cache directory if it was built before.

    Args:
        source: the kernel; its text may import triton and the standard library only, because nothing else is part
            of the key it is kept under.

    Returns:
        The kernel, to be launched through ``tilewright.codegen.cpu.launch`` with one slot for each of ``params``.
        Kernels built twice share their code.

    Raises:
        CodegenError: the text has no such function, the function has other parameters, or it does not compile.
        UnsupportedOp: the kernel cannot run on the CPU.
    """
    target = CpuTarget.native()
    key = kernel_key(source, target)
    with _build_lock:
        code = _loaded.get(key) or _load(store.get(key))
        if code is None:
            entry = _compile(source, target)
            store.put(key, entry)
            code = _load(entry)
            if code is None:
                raise CodegenError(f"kernel '{source.name}' was built but cannot be read back")
        _loaded[key] = code
    params = tuple(name for name, _ in source.signature)
    return BuiltKernel(source, code.address, params, code, stops=settings.get_once("check") or source.asserts)


def kernel_key(source: KernelSource, target: CpuTarget) -> str:
    """Digest of everything the object code of a kernel depends on, the setting ``check`` among it."""
    mode = "checked" if settings.get_once("check") else ""
    return store.key("kernel", repr(source), target.key, toolchain_version(), front_end_version(), mode)


def _load(entry: bytes | None) -> jit.Code | None:
    if entry is None:
        return None
    symbol, _, object_code = entry.partition(b"\n")
    return jit.load(object_code, symbol.decode())


def _compile(source: KernelSource, target: CpuTarget) -> bytes:
    """Runs the front end and the backend's stages; returns the symbol, a newline, and the object code."""
    import triton
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tilewright.codegen.cpu.compiler import CpuBackend

    path = _write_source(source)
    function = _import_function(source, path)
    backend = CpuBackend(GPUTarget("cpu", target.key, 1))
    launch = {"num_warps": source.num_warps, "num_stages": source.num_stages}
    # Debug mode is what compiles assertions in; its tests for overflow are not asked for.
    options = backend.parse_options({**launch, "debug": source.asserts, "sanitize_overflow": False})
    ast_source = ASTSource(function, *_specialization(source, function))
    context = ir.context()
    ir.load_dialects(context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, ast_source.language)
    metadata: dict[str, Any] = {}
    try:
        code_generation = backend.get_codegen_implementation(options)
        product = ast_source.make_ir(backend.target, options, code_generation, backend.get_module_map(), context)
        for stage in stages.values():
            product = stage(product, metadata)
    except triton.CompilationError as error:
        raise CodegenError(
            f"kernel '{source.name}' does not compile",
            where=Where(node=source.name, source=str(path)),
            why=str(error),
            hint="the kernel's text is in the file named above",
        ) from error
    if len(metadata["params"]) != len(source.signature):
        raise CodegenError(
            f"kernel '{source.name}' was compiled with other parameters",
            where=Where(node=source.name, source=str(path)),
            why=f"the signature has {len(source.signature)}, the code {metadata['params']}",
        )
    return metadata["name"].encode() + b"\n" + store.unseal(product, where=source.name)


def _specialization(
    source: KernelSource, function: Any
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and attributes as ``ASTSource`` takes them; ``"*fp32:16"`` becomes a divisibility."""
    given = dict(source.signature)
    constants = dict(source.constexprs)
    names = list(function.arg_names)
    if sorted(names) != sorted([*given, *constants]):
        raise CodegenError(
            f"kernel '{source.name}' has other parameters than its record says",
            where=Where(node=source.name),
            why=f"the function takes {', '.join(names)}; the record gives {', '.join([*given, *constants])}",
        )
    if [name for name in names if name in given] != list(given):
        raise CodegenError(
            f"kernel '{source.name}' has its runtime parameters in another order than its record",
            where=Where(node=source.name),
            why=f"the function takes {', '.join(names)}; the record gives {', '.join(given)}",
        )
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(names):
        kind, _, divisor = given.get(name, "constexpr").partition(":")
        signature[name] = kind
        if divisor:
            attributes[(index,)] = [["tt.divisibility", int(divisor)]]
    return signature, constants, attributes


def _write_source(source: KernelSource) -> Path:
    """Writes the text to a file named by its content: Triton reads a kernel's text back from its file."""
    content = source.text.encode()
    name = f"{source.name}_{hashlib.sha256(content).hexdigest()[:16]}.py"
    path = store.directory() / "sources" / name
    try:
        if not path.is_file() or path.read_bytes() != content:
            store.write_atomic(path, content)
    except OSError:
        path = _scratch_directory() / name
        store.write_atomic(path, content)
    return path


@cache
def _scratch_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="tilewright-"))


def _import_function(source: KernelSource, path: Path) -> Any:
    """Executes the text as a module of that file and returns the kernel function."""
    import triton

    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(source.text, str(path), "exec"), module.__dict__)
    except Exception as error:
        raise CodegenError(
            f"the text of kernel '{source.name}' cannot be executed",
            where=Where(node=source.name, source=str(path)),
            why=f"{type(error).__name__}: {error}",
        ) from error
    function = getattr(module, source.function, None)
    if not isinstance(function, triton.runtime.JITFunction):
        raise CodegenError(
            f"kernel '{source.name}' has no function '{source.function}'",
            where=Where(node=source.name, source=str(path)),
            why="no function of this name is decorated with @triton.jit in its text",
        )
    return function
