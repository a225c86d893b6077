"""Multiple choice: which of its own options does a video show? (SSV2-MC; systems/tvtsv2.md, section 6)"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.data.media import VIDEO_ENDINGS
from pretrain.errors import DataError, SampleError, StorageError
from pretrain.objectives.contrast import normalized
from pretrain.runtime import storage
from pretrain.runtime.untrusted import parse_json
from pretrain.samples.narrated import NarratedClips


@dataclass(frozen=True)
class ChoiceQuestion:
    """A video, its options, and which of them is right."""

    path: str
    options: tuple[str, ...]
    answer: int


def read_questions(where: str, folder: str) -> list[ChoiceQuestion]:
    """Read a jsonl of `clip_name`, `options` and `answer`, a number or one of the options.

    Args:
        where: the file, any fsspec URL.
        folder: of the videos; a name without an ending is one of a video there.

    Raises:
        DataError: no such file, or a line that is no question.
    """
    try:
        lines = storage.read_bytes(where).decode("utf-8-sig").splitlines()
    except (StorageError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = parse_json(line.encode())
            options, answer = tuple(content["options"]), content["answer"]
            place = options.index(answer) if isinstance(answer, str) else int(answer)
            if not 0 <= place < len(options) or not all(isinstance(option, str) for option in options):
                raise ValueError(f"answer {answer!r} is none of {len(options)} options")
            found.append(ChoiceQuestion(_located(folder, str(content["clip_name"])), options, place))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{where}:{number}: {type(error).__name__}: {error}; allowed: an object of clip_name, options (a list "
                "of texts) and answer (one of them, or its number)"
            ) from error
    if not found:
        raise DataError(f"{where}: no questions")
    return found


@torch.no_grad()
def choose(
    objective: Any, samples: NarratedClips, questions: Sequence[ChoiceQuestion], device: torch.device
) -> tuple[list[bool], list[str]]:
    """Answer questions by the largest cosine; options of several questions are embedded once.

    Returns:
        whether each answer is right, without those of videos that can't be read, and a line about each of these.
    """
    known: dict[str, torch.Tensor] = {}
    right: list[bool] = []
    missing: list[str] = []
    for question in questions:
        try:
            clip = samples.judged_clip(storage.read_bytes(question.path))
        except (SampleError, StorageError) as error:
            missing.append(f"{question.path}: {error}")
            continue
        if fresh := [option for option in question.options if option not in known]:
            rows = normalized(objective.model.text(samples.captions(fresh).to(device)))
            known |= dict(zip(fresh, rows, strict=True))
        video = normalized(objective.features({"video": torch.from_numpy(clip[None]).to(device)}))[0]
        cosines = torch.stack([known[option] for option in question.options]) @ video
        right.append(int(cosines.argmax()) == question.answer)
    return right, missing


def _located(folder: str, name: str) -> str:
    if name.rpartition(".")[2].lower() in VIDEO_ENDINGS:
        return storage.join(folder, name)
    places = [storage.join(folder, f"{name}.{ending}") for ending in sorted(VIDEO_ENDINGS)]
    # One that is not there is told when it is read, and counted.
    return next((place for place in places if storage.exists(place)), places[0])
