"""The ONE table of settings: environment name, type, default and help of each.

Nothing else in the project reads environment variables. A value is read when it is used, so a change of
the environment takes effect at once, but for what every launch asks for (``get_once``); ``scope`` overrides values for
the duration of a ``with`` block.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tilewright.errors import OptionError


@dataclass(frozen=True)
class Setting:
    """One setting. ``default=None`` means it is derived where it is used; ``help`` then says how."""

    name: str
    env: str
    kind: type
    default: Any
    help: str


TABLE = (
    Setting(
        "cache_dir", "TILEWRIGHT_CACHE_DIR", Path, None, "Kernel and table cache; default: the user's cache folder"
    ),
    Setting(
        "verify", "TILEWRIGHT_VERIFY", bool, False, "Check each level's spec after every pass (always on in tests)"
    ),
    Setting(
        "check",
        "TILEWRIGHT_CHECK",
        bool,
        False,
        "Checked mode: CPU kernels test every access to memory and stop at a bad one",
    ),
    Setting("dump_dir", "TILEWRIGHT_DUMP_DIR", Path, None, "Write a numbered graph per pass and all kernels here"),
    Setting(
        "cpu_features", "TILEWRIGHT_CPU_FEATURES", str, None, "Instruction set for CPU kernels; default: this machine's"
    ),
    Setting(
        "triton_backend", "TRITON_DEFAULT_BACKEND", str, None, "Triton's own choice of driver; cpu: even beside a GPU"
    ),
    Setting("tune", "TILEWRIGHT_TUNE", bool, True, "Time GEMM variants on this machine; off: choose by a fixed rule"),
    Setting(
        "num_threads", "TILEWRIGHT_NUM_THREADS", int, None, "Threads of CPU kernels; default: torch.get_num_threads()"
    ),
)

_BY_NAME = {setting.name: setting for setting in TABLE}
_overrides: ContextVar[Mapping[str, Any]] = ContextVar("_overrides", default=MappingProxyType({}))
_read: dict[str, Any] = {}
_BOOLEANS = {"1": True, "true": True, "on": True, "yes": True, "0": False, "false": False, "off": False, "no": False}


def get(name: str) -> Any:
    """Current value of a setting: an override of ``scope``, else the environment, else the default.

    Raises:
        KeyError: no such setting.
        OptionError: the environment variable has a value of the wrong type.
    """
    setting = _BY_NAME[name]
    overrides = _overrides.get()
    if name in overrides:
        return overrides[name]
    text = os.environ.get(setting.env)
    return setting.default if text is None or text == "" else _parse(setting, text)


def get_once(name: str) -> Any:
    """As ``get``, but the environment is read once in the life of the process.

    For what every launch asks for: reading the environment takes longer than the launch of a small kernel.

    Raises:
        KeyError: no such setting.
        OptionError: the environment variable has a value of the wrong type.
    """
    overrides = _overrides.get()
    if name in overrides:
        return overrides[name]
    if name not in _read:
        # An override is in no variable, so this is the environment's value or the default.
        _read[name] = get(name)
    return _read[name]


def _parse(setting: Setting, text: str) -> Any:
    try:
        return _BOOLEANS[text.lower()] if setting.kind is bool else setting.kind(text)
    except (KeyError, ValueError):
        raise OptionError(
            f"setting {setting.env} cannot be read",
            why=f"its value {text!r} is not of type {setting.kind.__name__}",
            hint=f"{setting.help}; unset it to use the default",
        ) from None


@contextmanager
def scope(**values: Any) -> Iterator[None]:
    """Overrides settings inside a ``with`` block, for the thread that runs it alone, and restores them after it."""
    unknown = values.keys() - _BY_NAME.keys()
    if unknown:
        raise OptionError(f"no such setting: {', '.join(sorted(unknown))}", hint=f"settings: {', '.join(_BY_NAME)}")
    token = _overrides.set({**_overrides.get(), **values})
    try:
        yield
    finally:
        _overrides.reset(token)
