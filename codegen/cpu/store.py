"""Object code kept between processes, in the user's cache directory.

An entry is written to a temporary file, flushed to the disk and renamed, so other processes see all of it or
nothing. It starts with the digest of its content, so an entry that was cut off or altered is never used.
"""

import hashlib
import os
import tempfile
import warnings
from pathlib import Path

from tilewright import settings
from tilewright.errors import CacheError

_MAGIC = b"tilewright object 1\n"
_START = len(_MAGIC) + hashlib.sha256().digest_size


def directory() -> Path:
    """The setting ``cache_dir``, else the user's cache directory for tilewright. It need not exist."""
    chosen = settings.get("cache_dir")
    if chosen is not None:
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_cache_dir("tilewright"))


def key(*parts: str) -> str:
    """Digest of everything an entry depends on: hexadecimal, 64 characters."""
    digest = hashlib.sha256()
    for part in parts:
        # With the length, ("ab", "c") and ("a", "bc") are different keys.
        digest.update(f"{len(part)}:".encode() + part.encode())
    return digest.hexdigest()


def get(entry: str) -> bytes | None:
    """Content stored under a key; None if there is none or it is damaged (``put`` then replaces it)."""
    path = _path(entry)
    try:
        return unseal(path.read_bytes(), where=str(path))
    except (OSError, CacheError):
        return None


def put(entry: str, content: bytes) -> None:
    """Stores content under a key. A directory that cannot be written costs a warning, not the result."""
    try:
        write_atomic(_path(entry), seal(content))
    except OSError as error:
        warnings.warn(f"kernels are not kept between processes: {error}", RuntimeWarning, stacklevel=2)


def write_atomic(path: Path, content: bytes) -> None:
    """Creates or replaces a file so that no reader, and no crash, ever sees a part of it.

    Raises:
        OSError: the directory cannot be created or written.
    """
    # Entries are machine code that is executed: the directory is the user's alone.
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def seal(content: bytes) -> bytes:
    """Prepends a digest, so that ``unseal`` can tell altered or half-written bytes."""
    return _MAGIC + hashlib.sha256(content).digest() + content


def unseal(sealed: bytes, *, where: str) -> bytes:
    """Checks and removes what ``seal`` added.

    Raises:
        CacheError: the bytes are not what was sealed.
    """
    content = sealed[_START:]
    if not sealed.startswith(_MAGIC) or hashlib.sha256(content).digest() != sealed[len(_MAGIC) : _START]:
        raise CacheError(
            "cached object code was altered",
            where=where,
            why="its digest does not match: the file is incomplete, damaged or from another version",
            hint="remove the cache directory (for kernel[grid] calls TRITON_CACHE_DIR, by default ~/.triton/cache)",
        )
    return content


def _path(entry: str) -> Path:
    return directory() / "objects" / entry[:2] / entry
