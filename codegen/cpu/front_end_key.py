"""Triton's digest of its own files, kept between processes.

Every key of Triton's cache begins with a digest of the front end: ``triton.runtime.cache.triton_key`` reads and hashes
the whole of libtriton, hundreds of megabytes, once in each process. That takes far longer than the rest of a first
launch whose kernel is in the cache. The digest of the same files is the same: here it is stored under their names,
sizes and times of change, which is what Python's own cache of compiled modules goes by.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from tilewright.codegen.cpu import store

# What triton_key reads, below the package's folder.
_FOLDERS = ("compiler", "backends", "language", "_C")
_FILES = ("runtime/cache.py",)


@functools.cache
def remember() -> None:
    """Puts a remembering ``triton_key`` in the place of Triton's, for this process; it returns the same text."""
    import triton
    from triton.runtime import cache

    stock = getattr(cache, "triton_key", None)
    if stock is not None:
        cache.triton_key = remembering(stock, Path(triton.__file__).parent)


def remembering(digest: Callable[[], str], package: Path) -> Callable[[], str]:
    """``digest`` with a memory in the cache directory, for as long as the files of ``package`` stay as they are."""

    @functools.cache
    @functools.wraps(digest)
    def triton_key() -> str:
        entry = store.key("triton_key", *_described(package))
        found = store.get(entry)
        if found is not None:
            return found.decode()
        text = digest()
        store.put(entry, text.encode())
        return text

    return triton_key


def _described(package: Path) -> Iterator[str]:
    """Path, size in bytes and time of change in nanoseconds of each file."""
    paths = [package / name for name in _FILES]
    for folder in _FOLDERS:
        paths += sorted(path for path in (package / folder).rglob("*") if path.suffix in (".py", ".so"))
    for path in paths:
        status = path.stat()
        yield f"{path} {status.st_size} {status.st_mtime_ns}"
