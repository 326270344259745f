"""The processor that kernels are compiled for, as LLVM names it, with the few facts that lowering decides by."""

import functools
import hashlib
from dataclasses import dataclass

from tilewright import settings
from tilewright.errors import OptionError

_BF16_DOT = ("+avx512bf16",)
_INT8_DOT = ("+avx512vnni", "+avxvnni")

# Generic processors to cross-compile for: LLVM triple, LLVM cpu, features beyond those of the cpu. avx512 is
# the set of Cooper Lake, Sapphire Rapids and Zen 4 (bf16 and int8 dot products included).
_NAMED = {
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
    """

    triple: str
    cpu: str
    features: str
    vector_bits: int
    bf16_dot: bool
    int8_dot: bool
    fma: bool

    @staticmethod
    def native() -> "CpuTarget":
        """The target that kernels of this process are compiled for.

        This machine, unless the setting ``cpu_features`` names another instruction set ("avx512", "avx2",
        "neon"; "native" is the default).

        Raises:
            OptionError: the setting names no known instruction set.
        """
        name = settings.get("cpu_features")
        return CpuTarget.host() if name in (None, "native") else CpuTarget.named(name)

    @staticmethod
    @functools.cache
    def host() -> "CpuTarget":
        """This machine, whatever the settings say."""
        from llvmlite import binding as llvm

        features = llvm.get_host_cpu_features()
        flat = ",".join(sorted(f"{'+' if on else '-'}{name}" for name, on in features.items()))
        return _from_features(llvm.get_process_triple(), llvm.get_host_cpu_name(), flat)

    @staticmethod
    def named(name: str) -> "CpuTarget":
        """A generic target: "avx512", "avx2" or "neon".

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
    )
