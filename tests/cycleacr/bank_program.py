"""A memory bank that the ranks of a world fill and ask together; see tests/findings_program.py."""

from typing import Any

import torch
from torch import Tensor

from finetune.cycleacr.memory_bank import MemoryBank, MemoryOptions, SeenKeyframes, video_number
from pretrain.data.compose import slots_of
from pretrain.runtime.collectives import exchange, gather_ragged
from pretrain.runtime.process_group import Ranks

STEPS, SAMPLES, DIM = 3, 8, 6
VIDEOS = [video_number(name) for name in "abcde"]


def options(**changed: Any) -> MemoryOptions:
    return MemoryOptions(**{"past": 2, "future": 1, "max_per_second": 2, "dtype": "float32"} | changed)


def keyframes(step: int, positions: list[int]) -> SeenKeyframes:
    """SeenKeyframes at positions of a step: the same whoever makes them. Some videos and seconds come again."""
    numbers = [step * SAMPLES + position for position in positions]
    counts = [number % 4 for number in numbers]
    return SeenKeyframes(
        torch.tensor([VIDEOS[number % 3 if number % 7 else 4] for number in numbers]),
        torch.tensor([900 + number % 5 for number in numbers]),
        torch.tensor(counts),
        torch.tensor([1.0 + number / 10 for number in numbers], dtype=torch.float64),
        torch.cat(
            [torch.zeros(0, DIM), *(features(number, count) for number, count in zip(numbers, counts, strict=True))]
        ),
        torch.cat([torch.zeros(0), *(torch.linspace(0.5, 0.9, count) for count in counts)]),
    )


def features(number: int, count: int) -> Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(number))


def filled(ranks: Ranks, options: MemoryOptions) -> MemoryBank:
    """The bank after some steps."""
    bank = MemoryBank(DIM, options, seed=3)
    for step in range(STEPS):
        own = [int(slot) for slot in slots_of(0, SAMPLES // ranks.world_size, ranks.rank, ranks.world_size)]
        bank.put(keyframes(step, own), ranks)
    return bank


def asked(bank: MemoryBank, ranks: Ranks, loss: float | None = None, draw: int = 0) -> Tensor:
    """Windows of all videos and seconds, of which the first rank asks more than the others."""
    mine = [(video, second) for video in VIDEOS for second in range(899, 906)][ranks.rank :: ranks.world_size]
    if ranks.rank and ranks.world_size > 1:
        mine = mine[:3]
    videos, seconds = (torch.tensor(column) for column in zip(*mine, strict=True))
    return bank.windows(videos, seconds, ranks, loss, draw)


def findings(ranks: Ranks) -> dict[str, Any]:
    bank = filled(ranks, options())
    rows = gather_ragged(torch.arange(ranks.rank)[:, None] + 10 * ranks.rank, ranks)
    sent = torch.arange(ranks.world_size) + 10 * ranks.rank
    once = [1] * ranks.world_size
    return {
        "windows": asked(bank, ranks),
        "penalized": asked(bank, ranks, loss=1.5),
        "random": [asked(filled(ranks, options(choice="random")), ranks, draw=draw) for draw in (0, 1)],
        "capped": asked(filled(ranks, options(video_seconds=2)), ranks),
        "state": bank.state().tensor,
        "persons": len(bank),
        "ragged": [found.flatten().tolist() for found in rows],
        "exchanged": exchange(sent, once, once, ranks).tolist(),
    }
