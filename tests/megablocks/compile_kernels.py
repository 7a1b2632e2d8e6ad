"""Compile the Triton kernels of expert backends for GPUs that this machine lacks, and print results as JSON.

    python -m tests.megablocks.compile_kernels megablocks sm_80 sm_90
    python -m tests.megablocks.compile_kernels triton_grouped sm_86

It runs in a process of its own, because Triton decides once per process whether to compile or interpret.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.megablocks.interpreted import load_deepspeed_kernels
from turnout.moe.experts import megablocks_rows

WIDTH, TOP_K, N_EXPERTS = 2048, 8, 16
TYPES = {"bf16": "*bf16", "fp32": "*fp32"}
DIVISIBLE_BY_16 = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Kernel:
    """A kernel as it is called: constants are fixed at compile time, other arguments only have a type."""

    name: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]

    def compile(self, architecture: str) -> dict[str, Any]:
        names = self.function.arg_names
        signature = {name: self.types.get(name, "constexpr") for name in names}
        # Addresses, sizes and strides are multiples of 16, as in real models.
        aligned = [i for i, name in enumerate(names) if signature[name] != "constexpr"]
        source = ASTSource(
            fn=self.function,
            signature=signature,
            constexprs=self.constants,
            attrs={(i,): DIVISIBLE_BY_16 for i in aligned},
        )
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        built = compile_kernel(source, target=target, options=self.options)
        return {
            "kernel": self.name,
            "architecture": architecture,
            "shared_bytes": built.metadata.shared,
            "cubin_bytes": len(built.asm["cubin"]),
            "target": next(line for line in built.asm["ptx"].splitlines() if line.startswith(".target")),
        }


def megablocks_kernels() -> Iterator[Kernel]:
    """Yield what gather and scatter launch: one kernel, in two directions, without weights."""
    megablocks_rows._operators()
    copy = importlib.import_module("megablocks.backend.kernels")._padded_copy
    integers = dict.fromkeys(("indices", "bin_ids", "bins", "padded_bins"), "*i32")
    for dtype, pointer in TYPES.items():
        for direction, copies in (("gather", True), ("scatter", False)):
            constants = {"NUM_COLUMNS": WIDTH, "TOP_K": TOP_K, "A_TO_B": copies, "SCALE": False}
            config = copy.configs[-1]
            yield Kernel(
                f"{direction} {dtype}",
                copy.fn,
                {"a": pointer, "b": pointer, **integers},
                {**constants, **config.kwargs, "weights": None},
                {"num_warps": config.num_warps},
            )


def grouped_kernels() -> Iterator[Kernel]:
    """Yield what a grouped product in bf16 launches for experts, with two of its autotuner's settings: the
    deepest tile, which needs most memory, and the largest.
    """
    module = load_deepspeed_kernels()
    product, gradient, bounds = (
        module._group_gemm_kernel,
        module._group_gemm_dw_kernel,
        module._group_meta_kernel,
    )
    yield Kernel(
        "bounds",
        bounds,
        {"offs_ptr": "*i32", "m_start_ptr": "*i32", "m_size_ptr": "*i32", "E": "i32"},
        {"BLOCK": module._GROUP_META_BLOCK},
        {},
    )
    pointers = {"a_ptr": "*bf16", "b_ptr": "*bf16", "g_ptr": "*bf16", "out_ptr": "*bf16"}
    pointers |= {"group_m_start_ptr": "*i32", "group_m_size_ptr": "*i32"}
    sizes = dict.fromkeys(("M", "K", "KC", "NO"), "i32")
    for name, kernel, neighbours in (
        ("rows by matrices", product, ("stride_ak", "stride_bn", "stride_on")),
        ("rows by transposed matrices", product, ("stride_ak", "stride_bk", "stride_on")),
        ("gradient of matrices", gradient, ("stride_ak", "stride_gn", "stride_on")),
    ):
        strides = {n for n in kernel.fn.arg_names if n.startswith("stride_")} - set(neighbours)
        for config in (kernel.configs[2], kernel.configs[-1]):
            yield Kernel(
                f"{name} {config.kwargs}",
                kernel.fn,
                {**pointers, **sizes, **dict.fromkeys(strides, "i32")},
                {"NUM_GROUPS": N_EXPERTS, **dict.fromkeys(neighbours, 1), **config.kwargs},
                {"num_warps": config.num_warps, "num_stages": config.num_stages},
            )


KERNELS = {"megablocks": megablocks_kernels, "triton_grouped": grouped_kernels}


def main() -> None:
    backend, *architectures = sys.argv[1:]
    for kernel in KERNELS[backend]():
        for architecture in architectures:
            print(json.dumps(kernel.compile(architecture)), flush=True)


if __name__ == "__main__":
    main()
