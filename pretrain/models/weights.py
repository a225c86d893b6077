"""Import of other people's and other runs' weights into our models, strictly and with a report.

Layouts: official VideoMAE V1 and V2 pre-training checkpoints, also compiled (`_orig_mod.`), from DDP or DeepSpeed
(`module.`, containers `model`, `module`, `state_dict`), with or without optimiser; TorchScript archives; Hugging Face
VideoMAE; our own.
"""

import fnmatch
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pretrain.errors import WeightsError
from pretrain.models import huggingface
from pretrain.models.videomae import VideoMAE
from pretrain.models.weight_files import beside, read_raw

logger = logging.getLogger(__name__)

#: What wrappers put in front of every key.
WRAPPERS = ("_orig_mod.", "module.", "model.")
SHOWN_KEYS = 12


@dataclass
class LoadReport:
    """Fate of each key of a load, in official names."""

    source: str
    layout: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """in the model, not in the file"""
    unexpected: list[str] = field(default_factory=list)
    """in the file, not in the model"""
    reshaped: list[str] = field(default_factory=list)
    """loaded after adding or dropping axes of size one"""
    mismatched: list[str] = field(default_factory=list)
    """not loadable: another shape"""

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.layout} layout): {len(self.matched)} tensors matched"]
        for name in ("missing", "unexpected", "reshaped", "mismatched"):
            keys = getattr(self, name)
            shown = ", ".join(keys[:SHOWN_KEYS]) + (", ..." if len(keys) > SHOWN_KEYS else "")
            lines.append(f"  {name}: {len(keys)}" + (f" ({shown})" if keys else ""))
        return "\n".join(lines)


def load_weights(
    module: nn.Module,
    path: str,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    raw: Mapping[str, Tensor] | None = None,
) -> LoadReport:
    """Copy weights into `module` (official key names), on its device and in its type; also under ZeRO stage 3.

    Args:
        module: the model, materialised.
        path: file or folder (Hugging Face, ours), any fsspec URL.
        allow_missing: glob patterns of keys that may keep their value, for example `decoder.*`.
        allow_unexpected: glob patterns of keys in the file that may be ignored.
        raw: the weights, where the caller has read them; `path` then only names them.

    Raises:
        WeightsError: unreadable, or anything else is missing, unexpected or of another shape, or a config.json in the
            folder contradicts the model; nothing is loaded then.
    """
    path = str(path)
    raw = read_raw(path) if raw is None else raw
    report = LoadReport(path, layout_of(raw))
    return load_state(
        module, official_state(raw), report, allow_missing, allow_unexpected, _config_problems(module, path)
    )


def load_state(
    module: nn.Module,
    state: Mapping[str, Tensor],
    report: LoadReport,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    problems: Iterable[str] = (),
) -> LoadReport:
    """Copy a state dict into `module`, persistent buffers too; as `load_weights`, for weights that are already read.

    Args:
        report: with source and layout; is filled in and returned.
        problems: further reasons to refuse, found by the caller.
    """
    # keep_vars: detached tensors have lost the ds_* attributes by which stage 3 is known.
    targets = module.state_dict(keep_vars=True)
    report = _compare(report, state, {key: full_shape(value) for key, value in targets.items()})
    # All reasons are gathered before the first copy: a half-loaded model would train on without an error. The caller's
    # come first, since only the first ones are shown.
    refused = [f"config: {text}" for text in problems]
    refused += [f"missing: {key}" for key in _outside(report.missing, allow_missing)]
    refused += [f"unexpected: {key}" for key in _outside(report.unexpected, allow_unexpected)]
    refused += [f"mismatched: {text}" for text in report.mismatched]
    refused += [f"not finite: {text}" for text in not_finite({key: state[key] for key in report.matched})]
    # copy_ into a meta tensor does nothing and raises nothing.
    if any(target.is_meta for target in targets.values()):
        refused.append("the model lies on the meta device; materialise it before loading")
    if refused:
        raise WeightsError(
            f"{report}\nnothing was loaded. Refused because of:\n  " + "\n  ".join(refused[: 2 * SHOWN_KEYS]) + "\n"
            f"{_hints(report)}Check model.size and its overrides, or name the keys that may be missing or ignored "
            "(glob patterns). Weights that are not finite are of a run that went wrong: take an earlier checkpoint."
        )
    for key in report.matched:
        _copy(targets[key], state[key])
    logger.info("%s", report)
    return report


def _hints(report: LoadReport) -> str:
    """Say what names suggest that are of no layout known here."""
    missing = set(report.missing)
    prefixes: Counter[str] = Counter()
    for key in report.unexpected:
        parts = key.split(".")
        heads = (".".join(parts[:count]) + "." for count in range(1, len(parts)))
        prefixes.update(head for head in heads if key.removeprefix(head) in missing)
    hints = ""
    if prefixes and (most := prefixes.most_common(1)[0])[1] > len(report.missing) // 2:
        hints = f"{most[1]} of the missing weights are there behind {most[0]!r}: save that part as a file of its own. "
    if any(key.rpartition(".")[2] == "pos_embed" for key in report.unexpected):
        hints += "pos_embed is a stored table of positions, which this model computes: leave it out of the file. "
    return hints


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Find the tensors with NaN or infinity in them; a network with one of them answers NaN to everything."""
    counts = {key: int((~value.isfinite()).sum()) for key, value in state.items() if value.is_floating_point()}
    return [f"{key} ({count} of {state[key].numel()} values)" for key, count in counts.items() if count]


def layout_of(raw: Mapping[str, Tensor]) -> str:
    """Name the layout that these key names are of, for reports."""
    return "Hugging Face" if huggingface.is_huggingface(strip_wrappers(raw)) else "official"


def read_state(path: str) -> dict[str, Tensor]:
    """Read weights of a file or folder under official key names, whatever layout they have.

    Raises:
        WeightsError: nothing readable there.
    """
    return official_state(read_raw(path))


def official_state(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring weights in any known layout under official key names."""
    state = strip_wrappers(raw)
    return huggingface.to_official(state) if huggingface.is_huggingface(state) else state


def strip_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Strip from key names what torch.compile, DDP, DeepSpeed or an objective put in front of all of them."""
    # torch.compile of a part puts its prefix in the middle of names, so it is not stripped with the others in front.
    named = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    if len(named) < len(state):
        raise WeightsError("some weights occur both with and without the prefix _orig_mod.; keep one copy of each")
    while named:
        # Only what stands before every key: `model.` before some of them is part of a name.
        prefix = next((wrapper for wrapper in WRAPPERS if all(key.startswith(wrapper) for key in named)), None)
        if prefix is None:
            break
        named = {key.removeprefix(prefix): value for key, value in named.items()}
    return named


def _compare(report: LoadReport, state: Mapping[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> LoadReport:
    report.missing = [key for key in shapes if key not in state]
    report.unexpected = [key for key in state if key not in shapes]
    for key in [key for key in shapes if key in state]:
        found, wanted = tuple(state[key].shape), shapes[key]
        # Adding or dropping axes of size one moves no value; any other reshape could, and would load without an error.
        if _squeezed(found) != _squeezed(wanted):
            report.mismatched.append(f"{key} {list(found)} in the file, {list(wanted)} in the model")
            continue
        report.matched.append(key)
        if found != wanted:
            report.reshaped.append(key)
    return report


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Tell the full shape; a parameter that ZeRO stage 3 has partitioned shows none itself."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _outside(keys: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [key for key in keys if not any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)]


@torch.no_grad()
def _copy(parameter: Tensor, value: Tensor) -> None:
    if not hasattr(parameter, "ds_id"):
        parameter.copy_(value.reshape(parameter.shape))
        return
    import deepspeed

    # Without modifier_rank the change is lost: the gathered copy is thrown away when the context ends.
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value.reshape(parameter.shape))


def _config_problems(module: nn.Module, path: str) -> list[str]:
    """List contradictions between a VideoMAE and a config.json beside the weights; of other models it says nothing."""
    if not isinstance(module, VideoMAE):
        return []
    content = beside(path, "config.json")
    eps = (content.get("layer_norm_eps"), huggingface.DECODER_NORM_EPS)
    ours = (module.config.norm_eps, module.config.decoder_norm_eps)
    if eps[0] is not None and eps != ours:
        logger.warning(
            "%s: its layer norm epsilons are %s (last decoder norm %s), this model has %s and %s; outputs differ by "
            "about 1e-5. Set model.norm_eps and model.decoder_norm_eps for equal ones.",
            path, *eps, *ours,
        )  # fmt: skip
    return huggingface.config_problems(content, module.shape)
