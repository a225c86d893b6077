"""Files of weights: found in folders and containers, read without running anything, and named for what they are."""

import argparse
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec
import safetensors.torch
import torch
from torch import Tensor

from pretrain.errors import WeightsError
from pretrain.models.torchscript import is_torchscript, read_torchscript
from pretrain.runtime import storage
from pretrain.runtime.untrusted import SAMPLE_JSON_BYTES, foreign_objects, inner_name, parse_json

#: Where checkpoints keep the weights, in the order of preference (official fine-tuning code looks in the same order;
#: `model_state` is SlowFast's, and so EVAD's).
CONTAINERS = ("model", "module", "state_dict", "model_state")
#: Files in a folder, best first.
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
#: Bytes of a file that tell what it is, where it is no weights.
HEAD = 1024
#: What files begin with that people take for weights: what they are, and the way to the weights.
OTHERS = (
    (b"version https://git-lfs", "a pointer of Git LFS to the file and not the file: run `git lfs pull` in the clone"),
    (b"<!doctype", "a web page: the address needs a login or a consent, or is that of a page about the file"),
    (b"<html", "a web page: the address needs a login or a consent, or is that of a page about the file"),
    (b"<?xml", "an XML answer of a server, most likely an error: open it in an editor"),
    (b"{", "JSON: name the file of the weights, which lies beside it"),
    (b"\x1f\x8b", "packed by gzip: unpack it first"),
)
#: Class of a configuration, a dictionary, in checkpoints of Swin's trainer.
YACS = "yacs.config.CfgNode"
#: Files by which a checkpoint that DeepSpeed wrote, and not this program, is known.
DEEPSPEED = ("zero_to_fp32.py", "latest", "mp_rank_00_model_states.pt")


def read_raw(path: str) -> dict[str, Tensor]:
    """Read the tensors of a file or folder under the names they have there, containers opened."""
    fs, inner = storage.filesystem(str(path))
    if not fs.exists(inner):
        raise WeightsError(f"{path}: no such file or folder")
    if not fs.isdir(inner):
        return _read_file(str(path))
    name = next((name for name in FOLDER_FILES if fs.exists(storage.join(inner, name))), None)
    if name is None:
        raise WeightsError(f"{path}: a folder without any of {', '.join(FOLDER_FILES)}{_of_deepspeed(str(path))}")
    if not name.endswith(".index.json"):
        return _read_file(storage.join(str(path), name))
    parts = part_names(storage.join(str(path), name))
    return {key: value for part in parts for key, value in _read_file(storage.join(path, part)).items()}


def _of_deepspeed(path: str) -> str:
    fs, inner = storage.filesystem(path)
    if not any(fs.exists(storage.join(inner, name)) for name in DEEPSPEED):
        return ""
    return (
        "; it is a checkpoint of DeepSpeed, whose own script in it puts the weights of all ranks together: run "
        f"`python zero_to_fp32.py . weights` there and name {storage.join(path, 'weights')}"
    )


def part_names(index: str) -> list[str]:
    """List the files that an index of weights in parts (`…index.json`) names.

    Raises:
        WeightsError: it is damaged, or names files outside of its folder.
    """
    try:
        return sorted({inner_name(part) for part in parse_json(storage.read_bytes(index))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index}: no index of weights in parts ({type(error).__name__}: {error})") from error


def beside(path: str, name: str) -> dict[str, Any]:
    """Read a JSON file of the folder with the weights, of which `path` may name a file; empty where there is none.

    A weights file of another name is one of many in its folder, and what lies there describes none of them.

    Raises:
        WeightsError: it holds no JSON object.
    """
    folder = storage.parent(path) if PurePosixPath(path).name in FOLDER_FILES else path
    where = storage.join(folder, name)
    fs, inner = storage.filesystem(where)
    if not fs.exists(inner):
        return {}
    try:
        content = parse_json(storage.read_bytes(where))
    except ValueError as error:
        raise WeightsError(f"{where}: not valid JSON ({error}); mend it, or move it away from the weights") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{where}: found a {type(content).__name__}, allowed: a JSON object")
    return content


def _read_file(url: str) -> dict[str, Tensor]:
    # First, since some of these begin like weights, and the readers' errors tell of bytes.
    if told := _what_it_is(url):
        raise WeightsError(f"{url}: {told}")
    if url.endswith(".safetensors"):
        try:
            return safetensors.torch.load(storage.read_bytes(url))
        except safetensors.SafetensorError as error:
            raise WeightsError(f"{url}: not a safetensors file ({error})") from error
    return _tensors(url, _unpickle_tensors(url))


def _unpickle_tensors(url: str) -> Any:
    """Read a .pth file, or a TorchScript archive, without running code from it.

    Official files hold their arguments as an `argparse.Namespace`; that class, which only stores attributes, is the one
    exception to torch's list of allowed types.
    """
    try:
        with fsspec.open(url, "rb") as file:
            # Before torch.load, which refuses TorchScript archives where only weights may be read.
            if is_torchscript(file):
                return read_torchscript(file, url)
            # The look into the zip's directory has moved it.
            file.seek(0)
            known = _stand_ins(foreign_objects(file, [argparse.Namespace]))
            file.seek(0)
            # One context for all: an inner one that ends takes a type that it shares with an outer one off the list.
            with torch.serialization.safe_globals([argparse.Namespace, *known]):
                return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        # Not torch's own words, which tell how to run what is in the file.
        raise WeightsError(f"{url}: {_why_unread(url)}") from error


class _StandIn:
    """An object of somebody else's program, of which nothing is kept and nothing is run."""

    def __setstate__(self, state: object) -> None:
        pass


def _stand_ins(foreign: list[str]) -> list[Any]:
    """Give what takes the place of other programs' objects beside weights: AlphAction's and CycleACR's memory pool, the
    configuration of everybody who trains with Swin's code, GroupMixFormer say, and the schedule and optimiser that a
    warm-up holds (TDN).

    For files of theirs alone: of anybody else's it must be told that they hold objects.
    """
    if foreign == [YACS]:
        return [(OrderedDict, YACS)]  # the one kind of mapping that torch fills and gives attributes
    plain: dict[str, Any] = {"builtins.dict": dict, "collections.defaultdict": lambda *_: {}}
    theirs = [name for name in foreign if name.startswith(("alphaction.", "torch.optim."))]
    if not theirs or not {*foreign} <= {*theirs, *plain}:
        return []
    return [(_StandIn, name) for name in theirs] + [(made, name) for name, made in plain.items()]


def _what_it_is(url: str) -> str:
    """Name what a file is that is no weights; nothing where that can't be told."""
    with fsspec.open(url, "rb") as file:
        head = file.read(HEAD)
        start = head.lstrip().lower()
        size = file.seek(0, 2)
        if not head:
            return "an empty file: copy or download it again"
        for begins, what in OTHERS:
            if start.startswith(begins):
                return what
        # A zip has its directory at the end: the first part of one begins like a whole one.
        if head.startswith(b"PK") and not zipfile.is_zipfile(file):
            return f"cut, with {size} bytes: the copy or download did not end; get it again"
        if url.endswith(".safetensors") and size < _safetensors_size(file):
            return f"cut, with {size} bytes: the copy or download did not end; get it again"
    return ""


def _safetensors_size(file: IO[bytes]) -> int:
    """Read from its header how many bytes a safetensors file should have; 0 where it is none."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if file.read(1) != b"{" or length > SAMPLE_JSON_BYTES:
        return 0
    try:
        header = parse_json(b"{" + file.read(length - 1))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except ValueError:  # the header itself is cut
        return 8 + length
    except (KeyError, TypeError, IndexError, AttributeError):
        return 0
    return 8 + length + max(ends, default=0)


def _why_unread(url: str) -> str:
    """Say why a file was not read, with the names in it that are not allowed."""
    with fsspec.open(url, "rb") as file:
        foreign = foreign_objects(file, [argparse.Namespace])
    if not foreign:
        return "can't be read as plain tensors: damaged, or no file of torch at all"
    return (
        f"holds objects ({', '.join(foreign[:5])}) beside its tensors, and code from files is never run here; load it "
        "where you trust it, and save its state dict as safetensors"
    )


def _tensors(url: str, content: Any) -> dict[str, Tensor]:
    """Find the state dict inside a checkpoint's containers."""
    while isinstance(content, Mapping):
        inner = next((content[name] for name in CONTAINERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{url}: no state dict at the top or below {', '.join(CONTAINERS)}")
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
