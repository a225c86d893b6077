"""Export of a classifier as one graph file that needs nothing of this repository: ONNX, or torch.export's .pt2.

Input `video`: uint8 RGB [B, T, H, W, 3] as decoders give it, B free; normalisation is part of the graph, so that there
is nothing about pixels to get wrong. Output `logits`: float32 [B, classes].
"""

import importlib
import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from finetune.classification.frame_facts import VALUES
from pretrain.errors import WeightsError
from pretrain.models.pixels import PixelNormalization, unit_pixels
from pretrain.runtime import storage
from pretrain.runtime.untrusted import parse_json
from pretrain.runtime.vision_ops import ensure_torchvision

#: Newest operator set that torch's exporter writes (torch.onnx._constants.ONNX_MAX_OPSET), the first with a fused
#: attention operator.
OPSET = 23
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
#: Entry of a .pt2 file with the facts about classes and clips; ONNX files have them as metadata.
FACTS = "tubelet.json"
#: Facts that a program needs to judge a video, beside the values of its rule for frames.
FACT_NAMES = ("classes", "task", "sampling", "short_side", "clip", "average")
#: Facts that files of before there were second kinds of them don't have; the last is of pictures alone.
LATER_NAMES = ("geometry", "picture_filter")
#: Numbers of clips that a written graph is tried with, and how far its logits may be off, relative to the largest one.
TRIED_BATCHES = (1, 3)
TOLERANCE = 1e-3


class PixelsToLogits(nn.Module):
    """Classifier behind its normalisation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.normalization = PixelNormalization()

    def forward(self, video: Tensor) -> Tensor:
        logits: Tensor = self.model(self.normalization(unit_pixels(video)))
        return logits.float()


def trace(model: nn.Module, frames: int, height: int, width: int) -> ExportedProgram:
    """Trace a classifier in evaluation mode, for clips of one size and any number of them."""
    # torch takes a first axis of 0 or 1 for a constant.
    example = torch.zeros(2, frames, height, width, 3, dtype=torch.uint8)
    with torch.no_grad():
        return torch.export.export(
            PixelsToLogits(model).eval(), (example,), dynamic_shapes={"video": {0: Dim("batch", min=1)}}
        )


def write_torch_export(program: ExportedProgram, dest: str, facts: Mapping[str, Any]) -> None:
    """Write a .pt2 file for `torch.export.load`.

    Args:
        program: from `trace`.
        dest: file, any fsspec URL.
        facts: about classes and clips, kept inside the file.
    """
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={FACTS: json.dumps(facts)})
    storage.write_bytes(dest, buffer.getvalue())


def write_onnx(program: ExportedProgram, dest: str, facts: Mapping[str, Any]) -> float:
    """Write a .onnx file, tried in onnxruntime; weights beyond 2 GB go to `dest`.data beside it.

    Args:
        program: from `trace`.
        dest: file, any fsspec URL.
        facts: about classes and clips, kept as the file's metadata.

    Returns:
        The largest difference of logits between onnxruntime and torch.

    Raises:
        WeightsError: packages are missing, or the logits differ.
    """
    _require_onnx()
    ensure_torchvision()
    graph = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=["video"],
        output_names=["logits"],
        custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
        verbose=False,
    )
    assert graph is not None
    graph.model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    with tempfile.TemporaryDirectory() as folder:
        # By its final name: a graph beyond 2 GB holds the name of the file with its weights.
        path = Path(folder) / PurePosixPath(dest).name
        graph.save(path)
        # Tried before anything lies at the destination: a wrong graph must not be found there.
        difference = onnx_difference(program, path)
        for file in sorted(Path(folder).iterdir()):
            storage.write_bytes(storage.join(storage.parent(dest), file.name), file.read_bytes())
    return difference


@dataclass(frozen=True)
class Graph:
    """Written graph: logits float32 [B, K] of clips uint8 [B, T, H, W, 3], and the facts that it was written with."""

    logits: Callable[[Tensor], Tensor]
    facts: dict[str, Any]


def read_graph(path: Path) -> Graph:
    """Open what `write_onnx` or `write_torch_export` wrote.

    Raises:
        WeightsError: it is not there, or not such a file, or packages are missing.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        graph = _read_onnx(path) if path.suffix == ".onnx" else _read_torch_export(path)
    except WeightsError:
        raise
    except Exception as error:  # both libraries raise many kinds for a file that is not theirs
        raise WeightsError(f"{path}: can't be opened ({type(error).__name__}: {error})") from error
    missing = [name for name in FACT_NAMES if name not in graph.facts]
    if missing:
        raise WeightsError(f"{path}: says nothing of {', '.join(missing)}; write it again with launch/export.py")
    return graph


def _read_onnx(path: Path) -> Graph:
    _require_onnx()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    stored = session.get_modelmeta().custom_metadata_map
    facts = {name: parse_json(stored[name]) for name in (*FACT_NAMES, *LATER_NAMES, *VALUES) if name in stored}
    return Graph(lambda clips: torch.from_numpy(session.run(None, {"video": clips.numpy()})[0]), facts)


def _read_torch_export(path: Path) -> Graph:
    if not zipfile.is_zipfile(path):  # torch would log a traceback of its own
        raise WeightsError(f"{path}: can't be opened: no .pt2 file")
    # torch.export.load writes into this dictionary what it finds under its names.
    stored = {FACTS: ""}
    module = torch.export.load(str(path), extra_files=stored).module()

    def logits(clips: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = module(clips)
        return found

    return Graph(logits, parse_json(stored[FACTS] or "{}"))


def onnx_difference(program: ExportedProgram, path: Path) -> float:
    """Measure the largest difference of logits between an ONNX file and its graph, on random clips.

    Raises:
        WeightsError: more than rounding explains.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    size = session.get_inputs()[0].shape[1:]
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch in TRIED_BATCHES:
        video = torch.randint(256, (batch, *size), dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            expected = program.module()(video)
        found = torch.from_numpy(session.run(None, {"video": video.numpy()})[0])
        difference = float((found - expected).abs().max())
        # Not `>`, which is false for NaN.
        if not difference <= TOLERANCE * max(float(expected.abs().max()), 1.0):
            raise WeightsError(
                f"onnxruntime {onnxruntime.__version__} gives other logits than torch {torch.__version__} for {batch} "
                f"clips (largest difference {difference:g}); nothing was written. Try other versions of them."
            )
        largest = max(largest, difference)
    return largest


def _stable_sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """Sort small integers for aten.sort.stable, which the exporter lacks: ONNX's TopK keeps equal values in order."""
    import onnxscript

    op: Any = onnxscript.opset23
    numbers = op.Cast(values, to=onnxscript.INT32.dtype)  # onnxruntime's TopK knows no int8
    length = op.Gather(op.Shape(numbers), op.Constant(value_ints=[dim]))
    return op.TopK(numbers, length, axis=dim, largest=int(descending), sorted=1)


def _require_onnx() -> None:
    for name in ONNX_PACKAGES:
        try:
            # Imported and not only looked for: a package whose libraries don't load is of no use either.
            importlib.import_module(name)
        except ImportError as error:
            raise WeightsError(f"--format onnx needs {name} ({error}); pip install 'tubelet[onnx]'") from error
