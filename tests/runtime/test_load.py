"""The server under mixed requests: every answer is the plain runner's, and nothing is left behind."""

import pytest

from .load import make_tasks, run_load, settled
from .serving import serving

GROWTH_MIB = 24


@pytest.mark.parametrize("requests", [96, pytest.param(1002, marks=pytest.mark.slow)])
def test_mixed_requests_are_answered_rightly_and_leave_nothing(pristine_bundle, bundle, requests):
    tasks = make_tasks(bundle)
    limits = ["--workers", "2", "--queue", "4", "--max-body-bytes", "20000", "--max-tokens", "64"]
    with serving(pristine_bundle, *limits) as server:
        run_load(server, tasks, 48, clients=12, seed=0)  # warm: threads and buffers are there
        server.wait_until_idle()
        _, files, _ = before = server.resources()
        counts = run_load(server, tasks, requests, clients=12, seed=1)
        server.wait_until_idle()
        after = settled(server, files)
        assert run_load(server, tasks, 6, clients=1, seed=2)["whole"] == 1  # and it still answers
    print(f"\n{'resident MiB, files, threads':>30}: {before} before, {after} after")
    print("\n".join(f"{kind:>30}: {count}" for kind, count in sorted(counts.items())))
    assert sum(count for kind, count in counts.items() if "429" not in kind) == requests
    assert after[0] < before[0] + GROWTH_MIB
    assert after[1] <= files and after[2] <= before[2]
