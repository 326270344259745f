"""What ``tilewright env`` tells: versions, the CPU, settings, the cache."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from tilewright import settings

_PACKAGES = ("torch", "triton", "transformers", "llvmlite", "numpy", "safetensors", "onnx", "onnxruntime")


def describe() -> dict[str, dict[str, Any]]:
    """Sections of plain values."""
    import torch

    from tilewright.codegen.cpu import store
    from tilewright.codegen.cpu.target import CpuTarget

    target = CpuTarget.native()
    versions = {"tilewright": version("tilewright"), "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    cpu = {
        "cpu": target.cpu,
        "triple": target.triple,
        "vector bits": target.vector_bits,
        "bf16 dot": target.bf16_dot,
        "int8 dot": target.int8_dot,
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
    }
    gpu = {"cuda": torch.cuda.is_available()}
    values = {f"{s.name} ({s.env})": str(settings.get(s.name)) for s in settings.TABLE}
    return {
        "versions": versions,
        "cpu": cpu,
        "gpu": gpu,
        "settings": values,
        "cache": {"folder": str(store.directory())},
    }
