"""What each expert backend requires of the model and of the machine, by name.

This module imports no torch, so that a config is checked within a second. The backends are in
moe/experts/experts.py.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What one backend requires.

    width_multiple     d_model and d_expert must be multiples of it
    packages           what it imports beyond torch and DeepSpeed
    is_half_precision  it would not keep the precision of fp32
    indexes_int32      its kernels index the elements of a matrix by int32
    """

    width_multiple: int = 1
    packages: tuple[str, ...] = ()
    is_half_precision: bool = False
    indexes_int32: bool = False

    @property
    def is_gpu_only(self) -> bool:
        """Whether it runs on GPUs only, as Triton's kernels do."""
        return "triton" in self.packages


INT32_ELEMENTS = 2**31  # how many elements an int32 can index

REQUIREMENTS: dict[str, Requirements] = {
    "reference": Requirements(),
    "sorted_loop": Requirements(),
    "compiled_loop": Requirements(),
    "torch_grouped": Requirements(width_multiple=8),  # rows of whole 16 bytes
    "megablocks": Requirements(
        width_multiple=8, packages=("triton", "megablocks", "stk"), indexes_int32=True
    ),
    "triton_grouped": Requirements(packages=("triton",), is_half_precision=True, indexes_int32=True),
}


def check_widths(backend: str, d_model: int, d_expert: int) -> None:
    """Check that a backend can compute experts of these widths. Raises ValueError if not."""
    multiple = REQUIREMENTS[backend].width_multiple
    if d_model % multiple or d_expert % multiple:
        raise ValueError(
            f"expert backend {backend!r} needs rows of whole 16 bytes: d_model={d_model} and "
            f"d_expert={d_expert} must be multiples of {multiple}; change them, or use backend 'sorted_loop'"
        )


def check_element_count(backend: str, **sizes: tuple[int, ...]) -> None:
    """Check that a kernel with int32 indexing can address matrices of these sizes. Raises ValueError if not.

    Such a kernel would silently read and write other memory.
    """
    for name, size in sizes.items():
        if math.prod(size) >= INT32_ELEMENTS:
            raise ValueError(
                f"expert backend {backend!r} needs matrices of less than {INT32_ELEMENTS:,} elements (int32 "
                f"indexing), but {name} would have {' x '.join(map(str, size))}; use fewer "
                "train.microbatch_seqs or more ranks, or backend 'torch_grouped'"
            )
