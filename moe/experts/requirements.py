"""What each expert backend asks of the model and of the machine, by name.

Imports no torch, so that a config can be checked in the first second. The backends are in moe/experts/experts.py.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a backend cannot do without.

    width_multiple     of which d_model and d_expert must be
    packages           what it imports beyond torch and DeepSpeed
    is_half_precision  it would not keep fp32's precision
    has_32_bit_places  its kernels count numbers in a matrix by int32
    """

    width_multiple: int = 1
    packages: tuple[str, ...] = ()
    is_half_precision: bool = False
    indexes_int32: bool = False

    @property
    def gpu(self) -> bool:
        """Whether it runs on GPUs only, as Triton's kernels do."""
        return "triton" in self.packages


INT32_ELEMENTS = 2**31  # that an int32 can count

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
    """Raise ValueError where a backend cannot take experts of these widths."""
    multiple = REQUIREMENTS[backend].width_multiple
    if d_model % multiple or d_expert % multiple:
        raise ValueError(
            f"expert backend {backend!r} needs rows of whole 16 bytes: d_model={d_model} and "
            f"d_expert={d_expert} must be multiples of {multiple}; change them, or use backend 'sorted_loop'"
        )


def check_element_count(backend: str, **sizes: tuple[int, ...]) -> None:
    """Raise ValueError where a matrix of these sizes is too large for a kernel that counts by int32.

    It would read and write elsewhere, without a word.
    """
    for name, size in sizes.items():
        if math.prod(size) >= INT32_ELEMENTS:
            raise ValueError(
                f"expert backend {backend!r} takes matrices of less than {INT32_ELEMENTS:,} numbers, but {name} "
                f"would have {' x '.join(map(str, size))}; use fewer train.microbatch_seqs or more ranks, or "
                "backend 'torch_grouped'"
            )
