"""The limits: rates of matrix products, of memory and of copies, and what aligned widths gain."""

from functools import partial
from unittest import mock

import torch

from bench.gpu_session.session import Rows, Session, median_seconds
from pretrain.models import vit
from pretrain.plan.hardware import find_gpu
from pretrain.runtime.speed import matmul_tflops

#: ViT-g's decoder: channels, hidden width, and the width that it is filled up to.
DECODER, HIDDEN, FILLED = 512, 2234, 2240


def rates(session: Session) -> dict[str, Rows]:
    """Measure large products by format, and copies in the device's memory."""
    torch.set_float32_matmul_precision("high")
    here = find_gpu("here")
    formats = (torch.bfloat16, torch.float32) if session.toy else (torch.bfloat16, torch.float16, torch.float32)
    by_format = [{"format": str(one)[6:], "TFLOP/s": matmul_tflops(session.device, one)} for one in formats]
    return {
        "rates": [{"matmul_tflops": here.matmul_tflops, "memory_gbs": here.memory_gbs}],
        "large products (float32: in TF32 where there is one)": by_format,
    }


def alignment(session: Session) -> dict[str, Rows]:
    """Compare the products and the whole MLP of ViT-g's decoder at 2,234 channels and filled up to 2,240."""
    tokens, rows = (64 if session.toy else 32 * 1024), []
    x = torch.randn(tokens, DECODER, device=session.device, dtype=torch.bfloat16)
    for width in (HIDDEN, FILLED):
        weight = torch.randn(width, DECODER, device=session.device, dtype=torch.bfloat16)
        seconds = median_seconds(partial(torch.matmul, x, weight.T), session.device)
        rows.append({"what": f"x @ W, {width} wide", "ms": 1e3 * seconds})
    for name, devices in (("2,234 as it is", (session.device.type,)), ("filled up to 2,240", ())):
        with mock.patch.object(vit, "UNALIGNED_DEVICES", devices):
            rows.append({"what": f"MLP, forward and backward, {name}", "ms": 1e3 * _mlp_seconds(session, x)})
    return {f"ViT-g's decoder, {tokens} tokens, bf16": rows}


def _mlp_seconds(session: Session, x: torch.Tensor) -> float:
    mlp = vit.Mlp(DECODER, HIDDEN).to(session.device, torch.bfloat16)

    def step() -> None:
        mlp(x).sum().backward()

    return median_seconds(step, session.device)


def copies(session: Session) -> dict[str, Rows]:
    """Measure copies of ViT-B's micro-batch to the device, from pageable and pinned memory, alone and beside work."""
    size = 1 << 20 if session.toy else 32 * 16 * 224 * 224 * 3
    pageable, rows = torch.ones(size, dtype=torch.uint8), []
    sources = {"pageable": pageable} if session.toy else {"pageable": pageable, "pinned": pageable.pin_memory()}
    target = torch.empty(size, dtype=torch.uint8, device=session.device)
    for name, source in sources.items():
        alone = median_seconds(partial(target.copy_, source, non_blocking=True), session.device)
        found = {"from": name, "ms": 1e3 * alone, "GB/s": size / alone / 1e9}
        rows.append(found | _beside_work(session, source, target))
    return {f"copies of {size / 1e6:.0f} MB to the device": rows}


def _beside_work(session: Session, source: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    """Tell the time of products alone, then with a copy queued before them and on a stream of its own."""
    if session.toy:
        return {}
    left = torch.randn(8192, 8192, device=session.device, dtype=torch.bfloat16)
    side = torch.cuda.Stream(session.device)

    def work() -> None:
        for _ in range(8):
            left @ left

    def on_the_stream() -> None:
        target.copy_(source, non_blocking=True)
        work()

    def beside() -> None:
        with torch.cuda.stream(side):
            target.copy_(source, non_blocking=True)
        work()

    ways = {"products, ms": work, "copy before, ms": on_the_stream, "copy beside, ms": beside}
    return {name: 1e3 * median_seconds(way, session.device) for name, way in ways.items()}
