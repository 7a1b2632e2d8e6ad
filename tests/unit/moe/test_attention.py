"""RoPE against that of transformers, and packed or windowed attention against a plain mask."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding, apply_rotary_pos_emb

from tests.models import tiny_config
from turnout.moe.attention import (
    apply_rope,
    attend,
    find_documents,
    has_varlen_kernel,
    rope_tables,
    takes_any_lengths,
)

CPU = torch.device("cpu")


def test_rope_equals_that_of_transformers() -> None:
    cfg = tiny_config(seq_len=50, d_head=12, rope_theta=5e4)
    q = torch.randn(1, cfg.n_heads, 50, 12, generator=torch.Generator().manual_seed(0))
    k = torch.randn(1, cfg.n_kv_heads, 50, 12, generator=torch.Generator().manual_seed(1))
    theirs = MixtralRotaryEmbedding(
        MixtralConfig(
            hidden_size=48,
            num_attention_heads=4,
            head_dim=12,
            rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        )
    )
    want_q, want_k = apply_rotary_pos_emb(q, k, *theirs(q, torch.arange(50)[None]))
    tables = rope_tables(cfg, 1, CPU, torch.float32)
    for x, want in ((q, want_q), (k, want_k)):
        got = apply_rope(x[0].transpose(0, 1), *tables).transpose(0, 1)[None]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_angles_of_late_positions_are_exact_in_any_dtype(dtype: torch.dtype) -> None:
    """In bf16, positions 4095 and 4096 would be equal, and the angle off by up to 8 radians."""
    cfg = tiny_config(seq_len=4097, d_head=6, rope_theta=1e4)
    cos, sin = rope_tables(cfg, 1, CPU, dtype)
    for position in (1, 257, 4095, 4096):
        for i in range(3):
            angle = position * 1e4 ** (-2 * i / 6)
            got = (float(cos[position, 0, i]), float(sin[position, 0, i]))
            assert got == pytest.approx((math.cos(angle), math.sin(angle)), abs=1e-3)


def test_rope_depends_on_distance_alone() -> None:
    cfg = tiny_config(seq_len=40)
    cos, sin = rope_tables(cfg, 1, CPU, torch.float64)
    q, k = torch.randn(2, 40, 1, 6, dtype=torch.float64).expand(2, 40, 1, 6)
    q, k = q[:1].expand(40, 1, 6), k[:1].expand(40, 1, 6)
    scores = (apply_rope(q, cos, sin).squeeze(1) @ apply_rope(k, cos, sin).squeeze(1).T).double()
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-10, atol=1e-10)


DOC_IDS = {
    "one document each": torch.zeros(3, 13, dtype=torch.int64),
    "uneven documents": torch.tensor([[0] * 13, [0] * 5 + [1] * 8, [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3]]),
    "single-token documents": torch.arange(13).repeat(3, 1),
}


class Record(TorchDispatchMode):
    """Records the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def slow_varlen_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """Do what torch documents of its kernel: a query sees keys from `left` before it to `right` after it."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    lengths = cu_seq_q.diff()
    assert max_q == max_k == int(lengths.max()) and enable_gqa == (q.size(1) != k.size(1))
    position, document = torch.arange(q.size(0)), torch.arange(len(lengths)).repeat_interleave(lengths)
    distance, (left, right) = position[:, None] - position, window_size
    visible = (document[:, None] == document) & (distance >= -right)
    if left >= 0:
        visible = visible & (distance <= left)
    parts = [x.transpose(0, 1) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*parts, attn_mask=visible, enable_gqa=enable_gqa).transpose(0, 1)


@pytest.mark.parametrize("by_length", [True, False], ids=["by length", "any lengths"])
@pytest.mark.parametrize("window", [None, 1, 3, 5, 12])
@pytest.mark.parametrize("doc_ids", DOC_IDS.values(), ids=DOC_IDS.keys())
def test_attention_equals_one_with_a_plain_mask(
    doc_ids: torch.Tensor, window: int | None, by_length: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel is for GPUs only.
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", slow_varlen_attn)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(39, 4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(39, 2, 6, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    got = attend(q, k, v, find_documents(doc_ids, CPU, by_length=by_length), window)

    position = torch.arange(13)
    visible = (position[:, None] >= position) & (doc_ids[:, :, None] == doc_ids[:, None, :])
    if window is not None:
        visible = visible & (position[:, None] - position < window)
    split = [x.view(3, 13, -1, 6).transpose(1, 2) for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*split, attn_mask=visible[:, None], enable_gqa=True)
    want = want.transpose(1, 2).reshape(39, 4, 6)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    mix = torch.randn(39, 4, 6, generator=generator, dtype=torch.float64)
    got_grads = torch.autograd.grad((got * mix).sum(), (q, k, v))
    want_grads = torch.autograd.grad((want * mix).sum(), (q, k, v))
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-11, atol=1e-11)


def test_documents_of_any_lengths_are_one_call_of_torchs_kernel() -> None:
    """Nothing is computed: fake tensors stand in for those of a GPU."""
    documents = find_documents(DOC_IDS["uneven documents"], CPU, by_length=False)
    with FakeTensorMode(allow_non_fake_inputs=True), Record() as record:
        q, k, v = (torch.empty(39, heads, 8, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
        out = attend(q, k, v, documents, 3)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert [name for name in record.names if "attn" in name or "attention" in name] == [
        "torch_attn._varlen_attn.default"
    ]


def test_a_cpu_groups_documents() -> None:
    assert not takes_any_lengths(CPU, torch.bfloat16, 64)


@pytest.mark.parametrize(
    ("capability", "dtype", "d_head", "has_it"),
    [
        ((7, 5), torch.float16, 64, False),
        ((8, 0), torch.bfloat16, 64, True),
        ((8, 0), torch.float32, 64, False),
        ((8, 6), torch.bfloat16, 12, False),
        ((8, 6), torch.bfloat16, 192, True),
        ((8, 6), torch.bfloat16, 200, False),
        ((9, 0), torch.bfloat16, 256, True),
        ((9, 0), torch.bfloat16, 264, False),
        ((12, 0), torch.bfloat16, 224, False),
    ],
)
def test_the_varlen_kernel_needs_certain_widths_and_gpus(
    capability: tuple[int, int], dtype: torch.dtype, d_head: int, has_it: bool
) -> None:
    assert has_varlen_kernel(capability, dtype, d_head) is has_it


def test_documents_are_grouped_by_length() -> None:
    documents = find_documents(DOC_IDS["uneven documents"], CPU)
    assert documents.groups == ((1, 2), (4, 1), (5, 1), (7, 1), (8, 1), (13, 1))
    assert sum(length * n for length, n in documents.groups) == 39
    assert find_documents(DOC_IDS["one document each"], CPU).order_T is None
