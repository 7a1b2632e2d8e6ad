"""Compiles the Triton kernels of expert backends for GPUs that are not here, and prints each result as JSON.

    python -m tests.megablocks.compile_kernels megablocks sm_80 sm_90

In a process of its own, because Triton decides once whether it compiles or interprets.
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

from moe import megablocks_backend

WIDTH, TOP_K = 2048, 8
TYPES = {"bf16": "*bf16", "fp32": "*fp32"}
PLACES_DIVISIBLE_BY_16 = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Kernel:
    """A kernel as it is called: constants are fixed when it is compiled, other arguments have a type."""

    name: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]

    def compile(self, architecture: str) -> dict[str, Any]:
        names = self.function.arg_names
        signature = {name: self.types.get(name, "constexpr") for name in names}
        pointers = [i for i, name in enumerate(names) if signature[name].startswith("*")]
        source = ASTSource(
            fn=self.function,
            signature=signature,
            constexprs=self.constants,
            attrs={(i,): PLACES_DIVISIBLE_BY_16 for i in pointers},
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
    """List what gather and scatter launch: one kernel, in two directions, without weights."""
    megablocks_backend._operators()
    copy = importlib.import_module("megablocks.backend.kernels")._padded_copy
    integers = dict.fromkeys(("indices", "bin_ids", "bins", "padded_bins"), "*i32")
    for number, pointer in TYPES.items():
        for direction, copies in (("gather", True), ("scatter", False)):
            constants = {"NUM_COLUMNS": WIDTH, "TOP_K": TOP_K, "A_TO_B": copies, "SCALE": False}
            config = copy.configs[-1]
            yield Kernel(
                f"{direction} {number}",
                copy.fn,
                {"a": pointer, "b": pointer, **integers},
                {**constants, **config.kwargs, "weights": None},
                {"num_warps": config.num_warps},
            )


KERNELS = {"megablocks": megablocks_kernels}


def main() -> None:
    backend, *architectures = sys.argv[1:]
    for kernel in KERNELS[backend]():
        for architecture in architectures:
            print(json.dumps(kernel.compile(architecture)), flush=True)


if __name__ == "__main__":
    main()
