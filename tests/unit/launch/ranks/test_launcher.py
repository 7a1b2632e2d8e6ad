"""Which environment variables the ranks get, and which of the user's stay as they are."""

import os

import pytest

from turnout.launch.ranks.launcher import CPU_ALLOCATOR, SHORT_SPIN, rank_environment


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", *CPU_ALLOCATOR, *SHORT_SPIN):
        monkeypatch.delenv(name, raising=False)


def test_ranks_on_cpus_share_the_cores_and_their_threads_spin_only_briefly() -> None:
    n_cores = len(os.sched_getaffinity(0))
    for nproc in (1, n_cores, 2 * n_cores):
        found = rank_environment(nproc, has_gpus=False)
        assert found["OMP_NUM_THREADS"] == str(max(1, n_cores // nproc))
        assert found.items() >= {**CPU_ALLOCATOR, "GOMP_SPINCOUNT": "5000"}.items()


def test_variables_that_the_user_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"OMP_NUM_THREADS": "7", "GOMP_SPINCOUNT": "0", "MALLOC_TOP_PAD_": "0"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    assert rank_environment(1, has_gpus=False).items() >= own.items()


def test_a_wait_policy_of_the_users_is_not_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    """libgomp gives GOMP_SPINCOUNT precedence over OMP_WAIT_POLICY."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert "GOMP_SPINCOUNT" not in rank_environment(1, has_gpus=False)


def test_ranks_on_gpus_get_no_cpu_settings() -> None:
    assert rank_environment(2, has_gpus=True).keys() == {"PYTHONSAFEPATH"}
