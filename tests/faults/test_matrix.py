"""Rows of the fault matrix that CI runs. `make faults` runs all (tests/faults/matrix.py).

Chosen are those of which no quicker test has the kind with real processes. Kills and stops of ranks are in
tests/engine (test_recovery.py, test_watchdog.py, test_ranks.py, test_kill.py), stores that fail in
tests/data/test_store_faults.py and tests/checkpoint/test_remote.py.
"""

import pytest

from tests.faults.catalogue import all_cases
from tests.faults.matrix import Matrix, impossible

CASES = {case.name: case for case in all_cases()}
CHOSEN = (
    "newest checkpoint, manifest cut, resume, 1 rank",
    "checkpoint half published, resume, 1 rank",
    "disk full until a save has failed, mid-epoch, 1 rank",
    "host lost with its disk, mid-epoch, 1 rank",
)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("name", CHOSEN)
def test_what_is_promised_is_kept(matrix: Matrix, name: str) -> None:
    if reason := impossible(CASES[name]):
        pytest.skip(reason)
    outcome = matrix.run(CASES[name])
    assert outcome.kept, outcome.seen


def test_the_matrix_has_every_phase_and_enough_rows() -> None:
    assert len(CASES) == len(all_cases()) >= 60, "names are unique"
    phases = {"start", "first step", "mid-epoch", "epoch border", "save", "upload", "resume"}
    assert phases <= {case.phase for case in CASES.values()}
