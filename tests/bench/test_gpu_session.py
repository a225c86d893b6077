"""bench/gpu.py: its list is complete, results say what they were measured with, and toy sizes go through here."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from bench import gpu
from bench.gpu_session import rates
from bench.gpu_session.engines import exposed_seconds
from bench.gpu_session.runs import _kill_all
from bench.gpu_session.session import TOY, Session, as_markdown, made_up, save
from bench.gpu_session.stages import Case, cases
from pretrain.objectives.base import method_of
from pretrain.plan.hardware import find_gpu
from pretrain.recipe.load import load_recipe


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(torch.device("cpu"), tmp_path)


@pytest.mark.parametrize("name", gpu.MEASUREMENTS)
def test_each_name_is_a_function_that_takes_what_it_is_given(name: str) -> None:
    wanted = ["session", "ranks"] if gpu.MEASUREMENTS[name].on_ranks else ["session"]
    assert list(inspect.signature(gpu.function_of(name)).parameters) == wanted


def test_sending_is_exposed_where_nothing_is_computed() -> None:
    sent = [(0.0, 4.0), (3.0, 6.0), (10.0, 12.0)]
    assert exposed_seconds(sent, []) == (8.0, 8.0)
    assert exposed_seconds(sent, [(1.0, 2.0), (1.5, 3.0), (5.0, 11.0)]) == (8.0, 4.0)
    assert exposed_seconds([], [(0.0, 1.0)]) == (0.0, 0.0)


def test_the_matrix_has_all_layouts_and_stage_3_that_keeps_all_comes_last() -> None:
    found = cases()
    assert len(set(found)) == len(found) == 3 * 2 * 3 + 2 * 2 * 3
    assert {case.init for case in found if case.stage < 3} == {"never"}
    last = [case for case in found if case.stage == 3 and case.recompute == "false"]
    assert found[-4:] == last and found[0] == Case(0, "fp32", "true", "never")


def test_batches_of_other_seeds_have_other_pixels() -> None:
    method = method_of(load_recipe("demo", [*TOY]))
    one, same, other = (made_up(method, 2, seed)["video"] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one[0], one[1])


def test_a_kill_reaches_those_in_sessions_of_their_own(tmp_path: Path) -> None:
    """As the ranks of torchrun are: the end of the launcher's group would leave them."""
    child = "import time, pathlib; pathlib.Path('here').touch(); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    process: Any = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path)
    while not (tmp_path / "here").exists():
        assert process.poll() is None
    (rank,) = psutil.Process(process.pid).children()
    _kill_all(process)
    assert not rank.is_running() and not psutil.pid_exists(process.pid)


def test_a_result_says_what_it_was_measured_with_and_gives_the_plan_its_rates(session: Session) -> None:
    path = session.folder / "gpu" / "rates.json"
    save(path, session, {"rates": [{"matmul_tflops": 600.0, "memory_gbs": 2500.0}]}, 1.0)
    content = json.loads(path.read_text())
    assert {"device", "driver", "date", "versions", "tables"} <= content.keys() and content["versions"]["torch"]
    found = find_gpu("h100", path)
    assert (found.matmul_tflops, found.memory_gbs, found.measured) == (600.0, 2500.0, True)


def test_tables_have_a_column_for_whatever_some_row_has() -> None:
    text = as_markdown("title", [{"a": 0.123456, "b": "x|y"}, {"a": 1, "c": None}])
    assert text.splitlines()[3:] == ["| a | b | c |", "|---|---|---|", "| 0.1235 | x\\|y |  |", "| 1 |  |  |"]


def test_toy_sizes_go_through(session: Session) -> None:
    assert set(rates.copies(session)) == {"copies of 1 MB to the device"}
    (rows,) = rates.alignment(session).values()
    assert len(rows) == 4 and all(row["ms"] > 0 for row in rows)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_all_go_through_here(tmp_path: Path) -> None:
    words = [sys.executable, gpu.__file__, "all", "--cpu", "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {path.stem for path in tmp_path.iterdir()} == set(gpu.MEASUREMENTS)
    content = {path.stem: json.loads(path.read_text())["tables"] for path in tmp_path.iterdir()}
    (layouts,), (killed,) = content["stages"].values(), content["kill"].values()
    assert all(row["right"] for row in layouts) and killed[0]["same losses"]


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "rates", "--out", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="found no GPU that torch can see; --cpu goes through the same code"):
        gpu.main()
