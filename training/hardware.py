"""Properties of the device: its peak FLOP/s, the expert backend chosen for it, and peak memory."""

import resource
import time
from dataclasses import dataclass

import torch

from turnout.moe.experts.experts import choose_backend
from turnout.training.config.run import RunConfig

# Dense bf16 FLOP/s from the vendor's data sheets. Full names, because PCIe and NVL boards are slower.
_GPU_BF16_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def expert_backend_of(cfg: RunConfig, device: torch.device) -> str:
    """Return the backend that a run uses on a device; `auto` chooses one that can index all its rows."""
    if cfg.train.expert_backend != "auto":
        return cfg.train.expert_backend
    chosen = choose_backend(cfg.model, device, DTYPES[cfg.train.precision])
    return chosen if cfg.fits_int32(chosen) else "sorted_loop"


@dataclass(frozen=True)
class PeakFlops:
    """FLOP/s of one rank, and the source of that number, without which an MFU means nothing."""

    flops_per_s: float
    source: str


def peak_flops(device: torch.device, dtype: torch.dtype) -> PeakFlops:
    """Return the data-sheet peak of a known GPU, otherwise the best of some square matrix products."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if name in _GPU_BF16_FLOPS and dtype in (torch.bfloat16, torch.float16):
            return PeakFlops(_GPU_BF16_FLOPS[name], f"{name} data sheet, dense bf16")
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.ones(2, size, size, dtype=dtype, device=device)
    best_s = min(_time_matmul(a, b) for _ in range(5))
    return PeakFlops(2 * size**3 / best_s, f"best {size}x{size} {dtype} matrix product, measured at start")


def cpu_has_bf16() -> bool:
    """Return whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def cpu_has_fp16() -> bool:
    """Return whether this CPU computes in fp16; DeepSpeed refuses fp16 elsewhere."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _time_matmul(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    a @ b
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - start


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process: allocated on its GPU, or resident on the host without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30  # Linux counts in KiB
