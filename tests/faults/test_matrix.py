"""Rows of the fault matrix that CI runs: one or two of each family. `make faults` runs all (tests/faults/matrix.py)."""

import pytest

from tests.faults.catalogue import all_cases
from tests.faults.matrix import Matrix, impossible

CASES = {case.name: case for case in all_cases()}
CHOSEN = (
    "SIGKILL of rank 1, save, 2 ranks",
    "SIGKILL of all processes, upload, 1 rank",
    "SIGKILL of all processes, resume, 1 rank",
    "SIGTERM to a rank, epoch border, 1 rank",
    "SIGUSR1 to rank 1 alone, first step, 2 ranks",
    "stop file, start, 1 rank",
    "NaN loss, once; policy stop, mid-epoch, 1 rank",
    "newest checkpoint, manifest cut, resume, 1 rank",
    "checkpoint half published, resume, 1 rank",
    "disk full until a save has failed, mid-epoch, 1 rank",
    "data: connections reset in a third of the answers, mid-epoch, 1 rank",
    "data: server refuses connections for longer than data.deadline_s, mid-epoch, 1 rank",
    "data: a bit flipped in a third of the answers, mid-epoch, 1 rank",
    "upload: server killed, back after 3 s, upload, 1 rank",
    "host lost with its disk, mid-epoch, 1 rank",
    "run folder renamed, mid-epoch, 1 rank",
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
