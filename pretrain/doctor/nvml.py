"""What NVIDIA's management library (NVML) knows of a GPU: memory errors, throttling, links to its neighbours.

Asked through nvidia-ml-py (`pynvml`), whose functions and numbers are named here as it names them.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from pretrain.runtime.findings import Finding

CHECKS = ("GPU memory errors", "GPU clocks", "NVLink")

#: nvmlMemoryErrorType_t and nvmlEccCounterType_t: errors that were not corrected, since the driver was loaded.
UNCORRECTED, VOLATILE = 1, 0

#: Reasons for a low clock (nvmlClocksEventReasons) that ask for somebody; a power cap under load and idleness don't.
THROTTLING = {0x8: "hardware slowdown", 0x20: "heat, by the driver", 0x40: "heat, by the hardware", 0x80: "power brake"}

#: NVLinks of a GPU at most (NVML_NVLINK_MAX_LINKS).
MAX_LINKS = 18


def check_gpu(device: torch.device) -> list[Finding]:
    """Ask NVML about an accelerator; nothing where it is no GPU of NVIDIA's."""
    if device.type != "cuda" or torch.version.hip:
        return []
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        # By its UUID: NVML numbers all GPUs of the host, and the process may be shown some of them.
        return list(judge_gpu(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")))
    except Exception as error:  # neither the package nor the library need be there, and a doctor gets to the end
        return [_not_asked(check, error) for check in CHECKS]


def judge_gpu(nvml: Any, gpu: Any) -> Iterator[Finding]:
    """Judge what `nvml`, the module pynvml, says of a GPU by its handle."""
    for check, examine in zip(CHECKS, (_memory_errors, _clocks, _links), strict=True):
        try:
            yield examine(check, nvml, gpu)
        except nvml.NVMLError as error:  # a GPU without ECC, a driver that is older than the question
            yield _not_asked(check, error)


def _memory_errors(check: str, nvml: Any, gpu: Any) -> Finding:
    errors = nvml.nvmlDeviceGetTotalEccErrors(gpu, UNCORRECTED, VOLATILE)
    _, _, pending, failed = nvml.nvmlDeviceGetRemappedRows(gpu)
    value = f"{errors} uncorrected" + ", rows wait for a reset to be replaced" * bool(pending)
    value += ", rows can't be replaced" * bool(failed)
    advice = "take the host out of the job: reset the GPU, or have it changed"
    return Finding(check, "fail" if errors or pending or failed else "ok", value, advice)


def _clocks(check: str, nvml: Any, gpu: Any) -> Finding:
    reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)
    held = [name for bit, name in THROTTLING.items() if reasons & bit]
    advice = "look at cooling and power supply (nvidia-smi -q -d PERFORMANCE): all ranks wait for this one"
    return Finding(check, "fail" if held else "ok", f"lowered: {', '.join(held)}" if held else "not lowered", advice)


def _links(check: str, nvml: Any, gpu: Any) -> Finding:
    states = []
    for number in range(MAX_LINKS):
        try:
            states.append(nvml.nvmlDeviceGetNvLinkState(gpu, number))
        except nvml.NVMLError:  # beyond the last link of this GPU, or it has none
            break
    down = [str(number) for number, state in enumerate(states) if not state]
    if down and len(down) < len(states):
        value = f"{len(down)} of {len(states)} links down: {', '.join(down)}"
        return Finding(check, "fail", value, "reset the GPU, or have its bridge changed (nvidia-smi nvlink --status)")
    return Finding(check, "ok", f"{len(states) - len(down)} links up")


def _not_asked(check: str, error: Exception) -> Finding:
    first = (str(error).strip().splitlines() or [""])[0]
    advice = "pip install nvidia-ml-py, where that is what is missing"
    return Finding(check, "warn", f"not asked: {type(error).__name__}: {first}", advice)
