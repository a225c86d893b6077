import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain.errors import TrainingError
from pretrain.runtime.process_group import _check_cpu_is_meant, launch_environment
from pretrain.runtime.roll_call import roll_call
from tests.ranks import free_port, outputs_of, start_rank, start_ranks

ROOT = Path(__file__).resolve().parents[2]


def test_a_process_on_its_own_meets_itself_at_a_free_port() -> None:
    found = launch_environment({})
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(found["MASTER_PORT"])))


def test_launcher_variables_are_taken_as_they_are() -> None:
    given = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1", "OTHER": "x"}
    assert launch_environment(given) == {key: value for key, value in given.items() if key != "OTHER"}


@pytest.mark.parametrize("given", [{"WORLD_SIZE": "8"}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "2"}])
def test_half_an_environment_is_no_reason_to_train_alone(given: dict[str, str]) -> None:
    with pytest.raises(TrainingError, match="MASTER_ADDR"):
        launch_environment(given)


def test_slurm_step() -> None:
    environ = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_NNODES": "2",
        "SLURM_STEP_NODELIST": "gpu[017-018]",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
        "SLURM_JOB_ID": "1234567",
        "SLURM_STEP_ID": "0",
    }
    found = launch_environment(environ)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("5", "8", "1")
    assert found["MASTER_ADDR"] == "gpu017"
    assert found["MASTER_PORT"] == launch_environment(environ | {"SLURM_PROCID": "0"})["MASTER_PORT"]
    again = launch_environment(environ | {"SLURM_RESTART_COUNT": "1"})["MASTER_PORT"]
    assert again != found["MASTER_PORT"] and 20000 <= int(again) < 32000
    assert launch_environment(environ | {"MASTER_ADDR": "10.1.1.1"})["MASTER_ADDR"] == "10.1.1.1"


@pytest.mark.parametrize(
    ("bound", "device"),
    [
        ({"SLURM_GPUS_PER_TASK": "1"}, "0"),
        ({"SLURM_GPUS_PER_TASK": "h100:1"}, "0"),
        ({"SLURM_TRES_PER_TASK": "cpu=11,gres/gpu=1"}, "0"),
        ({"SLURM_TRES_PER_TASK": "cpu:1,gres/gpu:h100:4"}, "3"),
        ({"SLURM_TRES_PER_TASK": "cpu=1"}, "3"),
    ],
)
def test_a_task_that_is_bound_to_its_gpu_sees_it_as_the_first(bound: dict[str, str], device: str) -> None:
    environ = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3", "SLURM_STEP_ID": "0"}
    environ |= {"SLURM_STEP_NODELIST": "n1", **bound}
    assert launch_environment(environ)["LOCAL_RANK"] == device


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1,a2", "a1"), ("n[3,7-9],m2", "n3"), ("m2,n[3,7-9]", "m2"), ("one", "one"), ("n[08-10]", "n08")],
)
def test_first_host_of_a_slurm_list(nodes: str, first: str) -> None:
    environ = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_STEP_NODELIST": nodes}
    environ["SLURM_STEP_ID"] = "0"
    assert launch_environment(environ)["MASTER_ADDR"] == first


def test_an_allocation_without_a_step_is_one_process() -> None:
    """`python launch/pretrain.py` in a batch script: one task, although the job has several."""
    assert launch_environment({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"})["WORLD_SIZE"] == "1"


def test_ranks_that_met_have_more_patience_with_each_other(tmp_path: Path) -> None:
    """One may take longer over a save than they were given to start."""
    code = (
        "import os, pathlib, time, torch.distributed as dist\n"
        "from pretrain.runtime.process_group import join\n"
        # Their imports may take any time, and are no part of what they are given.
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / os.environ['RANK']).touch()\n"
        "while len(list(folder.iterdir())) < 2:\n    time.sleep(0.05)\n"
        "ranks = join(timeout_s=5)\n"
        "time.sleep(6 * ranks.rank)\ndist.barrier()\nprint('MET')\n"
    )
    assert [output.count("MET") for output in both(code)] == [1, 1]


def both(code: str) -> list[str]:
    """What two ranks print that run `code`."""
    return outputs_of(start_ranks(["-c", code], 2), timeout_s=120)


def test_a_rank_that_never_comes_ends_the_others_soon_and_clearly() -> None:
    code = (
        "from pretrain.runtime.process_group import join\n"
        "from pretrain.errors import TrainingError\n"
        "try:\n    join(timeout_s=3)\nexcept TrainingError as error:\n    print('CLEAR', error)\n"
    )
    port, started = free_port(), time.monotonic()
    (output,) = outputs_of([start_rank(["-c", code], rank=0, ranks=2, port=port)], timeout_s=120)
    assert "CLEAR rank 0 of 2" in output, output
    assert f"127.0.0.1:{port}" in output
    assert "1 of 2 ranks have not come: 1; others are on " in output
    assert time.monotonic() - started < 100


def test_a_rank_with_another_back_end_is_named_to_all() -> None:
    """A node without its GPUs would join with gloo, and all would wait for each other until the time is over."""
    common = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def call(rank: int) -> str:
        try:
            roll_call(common | {"RANK": str(rank)}, 60, "gloo" if rank == 2 else "nccl")
        except TrainingError as error:
            return str(error)
        return ""

    started = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(call, range(3)))
    wanted = f"2 of 3 ranks talk by nccl, and not rank 2 on {socket.gethostname()} (gloo)"
    assert all(one.startswith(wanted) for one in said), said
    assert time.monotonic() - started < 30


def test_a_torch_for_gpus_does_not_train_on_the_cpu_unasked() -> None:
    with pytest.raises(TrainingError, match=r"sees none here \(CUDA_VISIBLE_DEVICES=''\)") as error:
        _check_cpu_is_meant("12.8", {"CUDA_VISIBLE_DEVICES": ""})
    assert "DS_ACCELERATOR=cpu" in str(error.value)
    _check_cpu_is_meant("12.8", {"DS_ACCELERATOR": "cpu"})
    _check_cpu_is_meant(None, {})
