"""What the doctor makes of NVML's answers and of NCCL's words; both are stand-ins, no GPU is needed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.doctor import nvml
from pretrain.doctor.network import judge_network, listen
from pretrain.runtime.findings import Finding


class NVMLError(Exception):
    pass


class Nvml:
    """pynvml of a sound GPU with four links; every answer can be another one."""

    NVMLError = NVMLError

    def __init__(self, **answers: Any) -> None:
        self.answers: dict[str, Any] = {
            "nvmlDeviceGetTotalEccErrors": 0,
            "nvmlDeviceGetRemappedRows": (1, 0, 0, 0),  # one replaced after a corrected error: nothing to do
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1 | 0x4,  # idle, power cap
            "nvmlDeviceGetNvLinkState": [1, 1, 1, 1],
        } | answers

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def answer(gpu: str, *arguments: int) -> Any:
            found = self.answers[name]
            if found is None or isinstance(found, list) and arguments[0] >= len(found):
                raise NVMLError("Not Supported")
            return found[arguments[0]] if isinstance(found, list) else found

        return answer


def judged(**answers: Any) -> dict[str, Finding]:
    return {finding.check: finding for finding in nvml.judge_gpu(Nvml(**answers), "gpu")}


def test_a_sound_gpu() -> None:
    found = judged()
    assert list(found) == list(nvml.CHECKS) and {finding.status for finding in found.values()} == {"ok"}
    assert found["NVLink"].value == "4 links up"


@pytest.mark.parametrize(
    ("question", "answer", "check", "words"),
    [
        ("nvmlDeviceGetTotalEccErrors", 2, "GPU memory errors", "2 uncorrected"),
        ("nvmlDeviceGetRemappedRows", (0, 1, 1, 0), "GPU memory errors", "rows wait for a reset"),
        ("nvmlDeviceGetRemappedRows", (0, 1, 0, 1), "GPU memory errors", "rows can't be replaced"),
        ("nvmlDeviceGetCurrentClocksThrottleReasons", 0x8, "GPU clocks", "hardware slowdown"),
        ("nvmlDeviceGetCurrentClocksThrottleReasons", 0x20, "GPU clocks", "heat, by the driver"),
        ("nvmlDeviceGetCurrentClocksThrottleReasons", 0x41, "GPU clocks", "heat, by the hardware"),
        ("nvmlDeviceGetCurrentClocksThrottleReasons", 0x80, "GPU clocks", "power brake"),
        ("nvmlDeviceGetNvLinkState", [1, 0, 1, 1], "NVLink", "1 of 4 links down: 1"),
    ],
)
def test_each_kind_of_trouble_fails(question: str, answer: Any, check: str, words: str) -> None:
    found = judged(**{question: answer})
    assert [name for name, finding in found.items() if finding.status == "fail"] == [check]
    assert words in found[check].value and found[check].advice


def test_what_could_not_be_asked_is_said() -> None:
    found = judged(nvmlDeviceGetTotalEccErrors=None)
    assert found["GPU memory errors"].status == "warn" and "not asked: NVMLError" in found["GPU memory errors"].value
    assert found["GPU clocks"].status == "ok"
    assert judged(nvmlDeviceGetNvLinkState=[])["NVLink"].value == "0 links up"


def test_without_the_library_all_of_it_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(nvml.importlib, "import_module", missing)
    found = nvml.check_gpu(torch.device("cuda", 0))
    assert [finding.check for finding in found] == list(nvml.CHECKS)
    assert all(finding.status == "warn" and "pynvml" in finding.value for finding in found)
    assert nvml.check_gpu(torch.device("cpu")) == []


OLD, NEW = "node1:7:7 [0] NCCL INFO Using network {}\n", "node1:7:7 [0] NCCL INFO Assigned NET plugin {} to comm\n"


@pytest.mark.parametrize(
    ("said", "several", "environ", "status", "words"),
    [
        (OLD.format("IB"), True, {}, "ok", "IB"),
        (NEW.format("Socket"), True, {}, "fail", "plain sockets, beside mlx5_0"),
        (OLD.format("Socket"), True, {}, "fail", "plain sockets, beside mlx5_0"),
        (NEW.format("Socket"), False, {}, "ok", "one host"),
        (NEW.format("Socket"), True, {"NCCL_NET": "Socket"}, "ok", "as asked for"),
        (NEW.format("Socket"), True, {"NCCL_IB_DISABLE": "1"}, "ok", "as asked for"),
        ("", True, {}, "warn", "not told"),
    ],
)
def test_plain_sockets_between_hosts_fail(
    tmp_path: Path, said: str, several: bool, environ: dict[str, str], status: str, words: str
) -> None:
    (tmp_path / "mlx5_0").mkdir()
    found = judge_network(said, several, environ, tmp_path)
    assert found.status == status and words in found.value
    if status == "fail":
        assert "no InfiniBand" in judge_network(said, several, environ, tmp_path / "none").value


def test_nccl_is_listened_to_unless_the_user_does() -> None:
    environ: dict[str, str] = {}
    path = listen(environ)
    assert path is not None and environ["NCCL_DEBUG_FILE"] == str(path)
    path.parent.rmdir()
    own = {"NCCL_DEBUG": "WARN"}
    assert listen(own) is None and own == {"NCCL_DEBUG": "WARN"}
