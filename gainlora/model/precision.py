"""In which precision products are computed, whatever the process allows elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def float32_products(cpu: str, gpu: str) -> Iterator[None]:
    """Compute products of float32 factors in these precisions of torch's: `ieee`; `tf32` or `bf16` factors with sums in
    float32."""
    backends: tuple[Any, Any] = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend, precision in zip(backends, (cpu, gpu), strict=True):
        backend.fp32_precision = precision
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Compute products in the dtypes given: without autocast, and float32 as float32."""
    autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    # a layer's call should cost nothing; where layers are compiled, no base's products are TF32
    if not autocast and (torch.compiler.is_compiling() or torch.backends.cuda.matmul.fp32_precision != "tf32"):
        yield
        return
    with torch.autocast(device.type, enabled=False), float32_products("ieee", "ieee"):
        yield
