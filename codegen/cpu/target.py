"""The processor that kernels are compiled for, as LLVM names it, with the few facts that lowering decides by."""

import ctypes
import functools
import hashlib
import sys
from dataclasses import dataclass

from tilewright import settings
from tilewright.errors import OptionError

LINE = 64
"""Bytes of a cache line."""
AHEAD = 4096
"""How far behind what is read memory is prefetched, in bytes, where a program reads a long run of its own."""

_BF16_DOT = ("+avx512bf16",)
_INT8_DOT = ("+avx512vnni", "+avxvnni")
_AMX = frozenset(("+amx-tile", "+amx-bf16", "+amx-int8"))

# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) of Linux on x86-64, as a plain system call.
_SYS_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18

# Generic processors to cross-compile for: LLVM triple, LLVM cpu, features beyond those of the cpu. avx512 is
# the set of Cooper Lake, Sapphire Rapids and Zen 4 (bf16 and int8 dot products included); amx adds tile registers.
_NAMED = {
    "amx": (
        "x86_64-unknown-linux-gnu",
        "x86-64-v4",
        "+amx-bf16,+amx-int8,+amx-tile,+avx512bf16,+avx512vbmi,+avx512vnni,+fma",
    ),
    "avx512": ("x86_64-unknown-linux-gnu", "x86-64-v4", "+avx512bf16,+avx512vbmi,+avx512vnni,+fma"),
    "avx2": ("x86_64-unknown-linux-gnu", "x86-64-v3", "+avx2,+f16c,+fma"),
    "neon": ("aarch64-unknown-linux-gnu", "generic", "+fp-armv8,+neon"),
}


@dataclass(frozen=True)
class CpuTarget:
    """One instruction set.

    Attributes:
        triple: LLVM target triple.
        cpu: LLVM processor name (``llc -mcpu``).
        features: LLVM feature string, sorted (``+avx2,+fma,-sse4a``).
        vector_bits: width of the vector registers that kernels use: 512, 256 or 128.
        bf16_dot: ``vdpbf16ps`` on ``vector_bits`` wide registers exists.
        int8_dot: ``vpdpbusd`` exists.
        fma: fused multiply-add exists.
        amx: dot products of bf16 and int8 on tile registers exist. A process has to be permitted to use them:
            ``host()`` asks, and names a machine without them where the answer is no.
    """

    triple: str
    cpu: str
    features: str
    vector_bits: int
    bf16_dot: bool
    int8_dot: bool
    fma: bool
    amx: bool = False

    @staticmethod
    def native() -> "CpuTarget":
        """The target that kernels of this process are compiled for.

        This machine, unless the setting ``cpu_features`` names another instruction set ("amx", "avx512", "avx2",
        "neon"; "native" is the default).

        Raises:
            OptionError: the setting names no known instruction set, or one with tile registers that this process
                may not use.
        """
        name = settings.get("cpu_features")
        target = CpuTarget.host() if name in (None, "native") else CpuTarget.named(name)
        if target.amx and not CpuTarget.host().amx:
            raise OptionError(
                f"this process cannot run code for {name!r}",
                where="setting cpu_features",
                why="the processor has no AMX tile registers, or the system does not permit their use",
                hint="avx512 has the same dot products without tiles",
            )
        return target

    @staticmethod
    @functools.cache
    def host() -> "CpuTarget":
        """This machine, whatever the settings say."""
        from llvmlite import binding as llvm

        features = dict(llvm.get_host_cpu_features())
        if features.get("amx-tile") and not _tiles_permitted():
            features |= {name: False for name in features if name.startswith("amx-")}
        flat = ",".join(sorted(f"{'+' if on else '-'}{name}" for name, on in features.items()))
        return _from_features(llvm.get_process_triple(), llvm.get_host_cpu_name(), flat)

    @staticmethod
    def named(name: str) -> "CpuTarget":
        """A generic target: "amx", "avx512", "avx2" or "neon".

        Raises:
            OptionError: no such target.
        """
        if name not in _NAMED:
            raise OptionError(
                f"no CPU target is called {name!r}",
                where="setting cpu_features",
                hint=f"known: native, {', '.join(_NAMED)}",
            )
        return _from_features(*_NAMED[name])

    @staticmethod
    def from_key(key: str) -> "CpuTarget":
        """The target that has this ``key``; the empty key means ``native()``.

        Raises:
            OptionError: the key belongs to another machine or another version of LLVM.
        """
        if not key:
            return CpuTarget.native()
        for target in (CpuTarget.native(), *map(CpuTarget.named, _NAMED), CpuTarget.host()):
            if target.key == key:
                return target
        raise OptionError(
            f"no CPU target has the key {key!r}",
            where=f"this machine is {CpuTarget.host().key}",
            why="the kernel was compiled for another processor or by another LLVM",
            hint="compile it again on this machine",
        )

    @functools.cached_property
    def key(self) -> str:
        """Name of everything that code generation depends on; part of cache keys.

        The feature string of a host has about 100 entries, so it is present as a digest.
        """
        text = "\n".join((self.triple, self.cpu, self.features, str(self.vector_bits)))
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return f"{self.triple.split('-')[0]}-{self.cpu}-{self.vector_bits}-{digest}"

    @property
    def lanes_f32(self) -> int:
        """fp32 lanes of a vector register."""
        return self.vector_bits // 32

    @property
    def is_x86(self) -> bool:
        """True for x86-64, false for arm64."""
        return self.triple.startswith(("x86_64", "amd64"))


def _from_features(triple: str, cpu: str, features: str) -> CpuTarget:
    enabled = frozenset(features.split(","))
    x86 = triple.startswith(("x86_64", "amd64"))
    # The 512-bit code paths use byte and word lanes and masks on shorter vectors: F alone is not enough.
    avx512 = cpu == "x86-64-v4" or {"+avx512f", "+avx512bw", "+avx512vl", "+avx512dq"} <= enabled
    bits = 128
    if x86:
        bits = 512 if avx512 else 256 if "+avx2" in enabled else 128
    return CpuTarget(
        triple=triple,
        cpu=cpu,
        features=features,
        vector_bits=bits,
        bf16_dot=bits == 512 and not enabled.isdisjoint(_BF16_DOT),
        int8_dot=x86 and not enabled.isdisjoint(_INT8_DOT),
        fma="+fma" in enabled or not x86,
        amx=bits == 512 and enabled >= _AMX,
    )


@functools.cache
def _tiles_permitted() -> bool:
    """Asks the system to let this process use AMX tile registers; the answer holds for all threads and forks.

    Every process that runs compiled kernels passes here, also one that only loads cached object code: the loader
    asks for ``CpuTarget.host()``.
    """
    if sys.platform != "linux":
        return False
    numbers = (ctypes.c_long(number) for number in (_SYS_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA))
    result = ctypes.CDLL(None).syscall(*numbers)
    return bool(result == 0)
