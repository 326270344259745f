"""Names the versions that object code depends on; part of every cache key. Imports neither torch nor triton."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path


@functools.cache
def llvm_version() -> str:
    """llvmlite and the LLVM inside it."""
    from llvmlite import binding as llvm

    numbers = ".".join(str(part) for part in llvm.llvm_version_info)
    return f"llvmlite{importlib.metadata.version('llvmlite')}-llvm{numbers}"


@functools.cache
def toolchain_version() -> str:
    """Everything but the target that turns Triton IR into object code: LLVM, and this package's sources."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{llvm_version()}-{digest.hexdigest()[:32]}"


@functools.cache
def front_end_version() -> str:
    """Triton, which turns Python into Triton IR."""
    return f"triton{importlib.metadata.version('triton')}"
