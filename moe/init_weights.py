"""Initial weights as a function of (seed, global parameter name) and nothing else.

Each tensor, and each expert by its global id, has a generator of its own. So a rank that holds a few experts,
or builds its layers in another order, starts from the same weights as one process that holds them all.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from turnout.moe.model import Decoder
from turnout.moe.parallel.sharding import is_expert, own_part, split_of


@torch.no_grad()
def init_weights(decoder: Decoder, *, seed: int, first_expert: int = 0) -> None:
    """Fill every parameter in place: norms with 1, others normal with init_std. A split one gets its part.

    Projections back into the residual stream (attn.o, *.down) use init_std / sqrt(2 * n_layers), so that the
    stream's variance does not grow with depth (GPT-2, Radford et al. 2019, section 2.3).
    first_expert: the global id of the first expert that this process holds
    """
    cfg = decoder.cfg
    for name, parameter in decoder.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
            continue
        is_residual = name.endswith(("attn.o.weight", ".down", ".down.weight"))
        std = cfg.init_std / math.sqrt(2 * cfg.n_layers) if is_residual else cfg.init_std
        if is_expert(name):
            for local_id, expert in enumerate(parameter):
                expert.copy_(initial_values(expert.shape, std, f"{name}.{first_expert + local_id}", seed))
        else:
            split, shape = split_of(name), list(parameter.shape)
            if split is not None:
                shape[split.dim] *= decoder.tp.size
            whole = initial_values(shape, std, name, seed)
            parameter.copy_(own_part(whole, split, decoder.tp.size, decoder.tp.rank))


def initial_values(shape: Sequence[int], std: float, name: str, seed: int) -> Tensor:
    """Return normal values of this shape, in fp32 on the CPU, that follow from seed and name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    # In fp32 on the CPU whatever the target, so that device and dtype change nothing but rounding.
    return torch.empty(tuple(shape), dtype=torch.float32).normal_(0.0, std, generator=generator)
