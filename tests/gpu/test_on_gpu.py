"""Tests that need a GPU: kernels, half precision, and the engine with both. Elsewhere they are skipped."""

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.assertions import assert_same_grads, relative_error
from tests.distributed.layouts.test_layouts_agree import CONFIGS, GENTLE_LR
from tests.distributed.runs.test_train_command import RECIPE, check_same_rows, turnout
from tests.layouts import forget_groups, train_on_ranks, with_split
from tests.models import packed_inputs, random_state, tiny_config, tiny_decoder
from tests.unit.data_fixtures import make_corpus, make_texts
from turnout.launch.ranks.launcher import free_port
from turnout.moe.attention import attend, find_documents, takes_any_lengths
from turnout.moe.experts.experts import EXPERT_BACKENDS, reference_experts
from turnout.moe.experts.requirements import REQUIREMENTS
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import build_decoder
from turnout.moe.moe_layer import MoELayer
from turnout.moe.parallel.expert_parallel import AllToAllDispatcher, LocalDispatcher
from turnout.moe.parallel.tensor_parallel import Unsplit
from turnout.moe.recompute import RoutingMemo
from turnout.training.parallel.flight_recorder import NullRecorder
from turnout.training.parallel.groups import Groups, join_groups, leave_groups
from turnout.training.parallel.layout import Layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
KERNELS = ["torch_grouped", "megablocks", "triton_grouped"]


def need(backend: str, dtype: torch.dtype) -> None:
    """Skip a test if the backend does not compute this dtype, or this machine lacks its packages."""
    if REQUIREMENTS[backend].is_half_precision and dtype.itemsize != 2:
        pytest.skip(f"{backend} computes in half precision only")
    missing = [name for name in REQUIREMENTS[backend].packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{backend} needs {' and '.join(missing)}; README.md says how to install it")


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("name", sorted(EXPERT_BACKENDS.keys() - {"reference"}))
def test_expert_backend_equals_the_loop(name: str, dtype: torch.dtype) -> None:
    need(name, dtype)
    counts = torch.tensor([70, 0, 130, 1, 55], device=CUDA)
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "rows": (256, 64),
        "weights": (256,),
        "gate_up": (5, 64, 192),
        "down": (5, 64, 96),
    }
    results = []
    for backend in (EXPERT_BACKENDS[name].apply, reference_experts):
        generator.manual_seed(0)
        leaves = {
            key: torch.randn(shape, generator=generator).to(CUDA, dtype).requires_grad_()
            for key, shape in shapes.items()
        }
        rows, weights, *matrices = leaves.values()
        out = backend(rows, weights, counts, *matrices)
        (out * torch.linspace(-1, 1, out.numel(), device=CUDA).view_as(out).to(dtype)).sum().backward()
        results.append((out, {key: leaf.grad for key, leaf in leaves.items()}))
    (got, got_grads), (want, want_grads) = results
    assert relative_error(got, want) <= RTOL[dtype]
    assert_same_grads(got_grads, want_grads, rtol=RTOL[dtype])


@pytest.mark.parametrize("dtype", RTOL, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_expert_layer_equals_the_one_with_the_loop(name: str, dtype: torch.dtype) -> None:
    """Kernels copy, compute and sum rows as tuned on this GPU; some rows are dropped."""
    need(name, dtype)
    cfg = tiny_config(
        d_model=136, d_expert=88, n_experts=12, top_k=3, seq_len=37, router={"capacity_factor": 1.0}
    )
    state = random_state(cfg)
    x = torch.randn(5 * cfg.seq_len, cfg.d_model, generator=torch.Generator().manual_seed(1))
    results = []
    for backend in (name, "reference"):
        layer = MoELayer(cfg, LocalDispatcher(), Unsplit(), backend, "none")
        generator = torch.Generator().manual_seed(2)
        for parameter in layer.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        layer.to(CUDA, dtype)
        leaf = x.to(CUDA, dtype).requires_grad_()
        is_counted = torch.ones(x.size(0), dtype=torch.bool, device=CUDA)
        bias_E, load_frac_E = state.bias_ME[0].to(CUDA), state.load_frac_ME[0].to(CUDA)
        out, stats = layer(leaf, bias_E, load_frac_E, is_counted, RoutingMemo())
        assert stats.n_dropped > 0
        (out * torch.linspace(-1, 1, out.numel(), device=CUDA).view_as(out).to(dtype)).sum().backward()
        results.append((out, {"x": leaf.grad, **{name: p.grad for name, p in layer.named_parameters()}}))
    (got, got_grads), (want, want_grads) = results
    assert relative_error(got, want) <= RTOL[dtype]
    assert_same_grads(got_grads, want_grads, rtol=RTOL[dtype])


@pytest.mark.parametrize("window", [None, 4])
def test_decoder_equals_the_cpu(window: int | None) -> None:
    cfg = tiny_config(sliding_window=window, n_shared_experts=1)
    on_cpu = tiny_decoder(cfg, dtype=torch.float32)
    on_gpu = build_decoder(cfg, device=CUDA)
    on_gpu.load_state_dict(on_cpu.state_dict())
    tokens, doc_ids, is_counted = packed_inputs(cfg)
    state = random_state(cfg)
    want, _ = on_cpu(tokens, doc_ids, is_counted, state)
    state = type(state)(state.bias_ME.to(CUDA), state.load_frac_ME.to(CUDA))
    got, _ = on_gpu(tokens.to(CUDA), doc_ids, is_counted.to(CUDA), state)
    assert relative_error(got.cpu(), want) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 4])
def test_attention_to_documents_of_any_lengths_equals_attention_grouped_by_length(
    window: int | None, dtype: torch.dtype
) -> None:
    doc_ids = torch.tensor([[0] * 13, [0] * 5 + [1] * 8, [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3]])
    assert takes_any_lengths(CUDA, dtype, 16)
    results = []
    for by_length in (False, True):
        generator = torch.Generator().manual_seed(0)
        leaves = [
            torch.randn(39, heads, 16, generator=generator).to(CUDA, dtype).requires_grad_()
            for heads in (4, 2, 2)
        ]
        out = attend(*leaves, find_documents(doc_ids, CUDA, by_length=by_length), window)
        (out * torch.linspace(-1, 1, out.numel(), device=CUDA).view_as(out).to(dtype)).sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) <= RTOL[dtype]


def test_compiled_blocks_equal_eager_ones() -> None:
    cfg, results = tiny_config(n_shared_experts=1), []
    for compiles in (False, True):
        decoder = build_decoder(cfg, device=CUDA, expert_backend="sorted_loop")
        decoder.load_state_dict(tiny_decoder(cfg, dtype=torch.float32).state_dict())
        if compiles:
            decoder.compile_blocks()
        tokens, doc_ids, is_counted = packed_inputs(cfg)
        state = RouterState.initial(cfg, CUDA)
        hidden, _ = decoder(tokens.to(CUDA), doc_ids, is_counted.to(CUDA), state)
        decoder.logits(hidden).square().sum().backward()
        results.append((hidden, {name: p.grad for name, p in decoder.named_parameters()}))
    (want, want_grads), (got, got_grads) = results
    assert relative_error(got, want) < 1e-4
    assert_same_grads(got_grads, want_grads, rtol=1e-3)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Groups]:
    """Join a process group that contains only this process, over NCCL."""
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**launched, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    yield join_groups(Layout(1), CUDA, timeout_s=60, recorder=NullRecorder())
    forget_groups()
    leave_groups()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_engine_trains_in_half_precision(precision: str, one_rank: Groups) -> None:
    cfg = CONFIGS["sequence scope"]
    full = train_on_ranks(0, with_split(cfg, 8), 1, "adamw", GENTLE_LR, device="cuda")
    half_cfg = with_split(cfg, 2, precision=precision)
    half = train_on_ranks(0, half_cfg, 1, "adamw", GENTLE_LR, device="cuda")
    assert half["losses"] == pytest.approx(full["losses"], rel=5e-3)


@pytest.mark.parametrize("name", KERNELS)
def test_an_expert_layer_waits_for_the_device_once(name: str, one_rank: Groups) -> None:
    need(name, torch.bfloat16)
    if name != "triton_grouped" and torch.cuda.get_device_capability(CUDA) < (9, 0):
        pytest.skip("before sm_90 torch's grouped matrix product also waits for the device")
    cfg = tiny_config(n_shared_experts=1)
    layer = MoELayer(cfg, AllToAllDispatcher(one_rank.ep), Unsplit(), name, "none").to(CUDA, torch.bfloat16)
    state = RouterState.initial(cfg, CUDA)
    x = torch.randn(2 * cfg.seq_len, cfg.d_model, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    inputs = (
        x,
        state.bias_ME[0],
        state.load_frac_ME[0],
        torch.ones(x.size(0), dtype=torch.bool, device=CUDA),
    )
    layer(*inputs, RoutingMemo())  # allocations, tuning and first calls also wait
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            layer(*inputs, RoutingMemo())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchronizing" in str(w.message)]) <= 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "parallel", ["ep=2", "ep=2 ep_chunks=2 ep_max_load=0.7", "tp=2 sequence_parallel=true ep=2"]
)
def test_two_gpus_log_the_same_rows_as_one(parallel: str, tmp_path: Path) -> None:
    make_corpus(tmp_path, {"text": make_texts(100)}, valid_frac=0.05, shard_tokens=5000)
    (tmp_path / "run.toml").write_text(RECIPE)
    settings = [word for setting in parallel.split() for word in ("--set", f"parallel.{setting}")]
    for run_dir, nproc, sets in (("one", "1", []), ("two", "2", settings)):
        run = turnout(tmp_path, "train", "run.toml", "--run-dir", run_dir, "--nproc", nproc, *sets)
        assert run.returncode == 0, run.stderr
    check_same_rows(tmp_path / "two", tmp_path / "one")
