"""What a command and the launcher of ranks put into the environment, and what they leave alone."""

import os

import pytest

from turnout.launch.ranks.launcher import CPU_ALLOCATOR, SPIN_SHORTLY, rank_environment


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", *CPU_ALLOCATOR, *SPIN_SHORTLY):
        monkeypatch.delenv(name, raising=False)


def test_ranks_on_cpus_share_the_cores_and_their_threads_soon_sleep() -> None:
    n_cores = len(os.sched_getaffinity(0))
    for nproc in (1, n_cores, 2 * n_cores):
        found = rank_environment(nproc, has_gpus=False)
        assert found["OMP_NUM_THREADS"] == str(max(1, n_cores // nproc))
        assert found.items() >= {**CPU_ALLOCATOR, "GOMP_SPINCOUNT": "5000"}.items()


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"OMP_NUM_THREADS": "7", "GOMP_SPINCOUNT": "0", "MALLOC_TOP_PAD_": "0"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    assert rank_environment(1, has_gpus=False).items() >= own.items()


def test_a_policy_of_waiting_is_not_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    """libgomp would take the number of rounds before the policy."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert "GOMP_SPINCOUNT" not in rank_environment(1, has_gpus=False)


def test_ranks_on_gpus_have_their_own_ways() -> None:
    assert rank_environment(2, has_gpus=True).keys() == {"PYTHONSAFEPATH"}
