"""TagAlign's trainable part: what moves the patches of a frozen CLIP to where texts about them lie.

Liu et al.: TagAlign, arXiv 2312.14149 (systems/tagalign.md, section 2.2). Two kinds: `gated_conv`, residual
convolutions behind gates that are closed at first, so that training begins with CLIP's own patches (officially
GDecoder), and `transformer`, one block. Behind both a trainable copy of CLIP's last norm and projection;
`load_projector` fills it. Shapes: B images, N = h w patches, C channels of the tower, E of the space that images and
texts share.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.errors import RecipeError, WeightsError
from pretrain.models.base import Architecture, Cost
from pretrain.models.clip import Config as ClipConfig
from pretrain.models.clip import check as clip_problems
from pretrain.models.clip import resolve
from pretrain.models.clip_weights import our_names
from pretrain.models.cubes import Grid
from pretrain.models.encoder import block_macs
from pretrain.models.linear import Linear, truncated_normal
from pretrain.models.recompute import Recompute
from pretrain.models.vit import Block
from pretrain.models.weights import LoadReport, load_state, strip_wrappers

#: Official names, less `projector.` -> ours; the two halves of unit n are our steps 2n and 2n + 1.
OFFICIAL_STEMS = {"clip_proj.ln.": "norm.", "clip_proj.proj": "head.weight", "projector.0.": "block."}
OFFICIAL_HALVES = {"conv": 0, "conv2": 1}
#: What official checkpoints hold beside the projector.
OFFICIAL_OTHERS = ("clip_text_encoder.", "clip_image_encoder.", "label_embedding", "cl_loss.", "ce_loss.")


@dataclass
class Config:
    """A projector for the patches of a CLIP."""

    name: str = "patch_projector"
    """architecture: pretrain/models/<name>.py"""
    kind: Literal["gated_conv", "transformer"] = "gated_conv"
    """gated_conv: residual convolutions behind gates (officially GDecoder); transformer: one block"""
    units: int = 2
    """gated_conv: units of two convolutions each"""
    kernel: int = 3
    """gated_conv: side of the kernels, patches; odd"""
    heads: int = 16
    """transformer: attention heads"""
    mlp_ratio: float = 4.0
    """transformer: hidden channels of the MLP = int(channels x mlp_ratio)"""
    surgery_blocks: int = 6
    """last blocks of the frozen image tower that run on two paths (CLIP surgery); 0: none"""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """sizes of the CLIP whose patches these are; `activation` where nothing beside its weights says it"""


class GatedConvolution(nn.Module):
    """x + tanh(gate) conv(GELU(norm(x))), norm over the channels of each patch; the gate starts at 0, closed.

    Args:
        dim: channels, C.
        kernel: side, odd.
    """

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2)
        # One value, not a scalar: without ZeRO DeepSpeed 0.19 can't sum the gradient of a parameter without dimensions.
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Tensor) -> Tensor:
        """Change maps [B, h, w, C]."""
        changed = self.conv(F.gelu(self.norm(maps)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return maps + self.gate.tanh() * changed


class PatchProjector(nn.Module):
    """Projector with CLIP's last norm and projection behind it, all of it trained.

    Raises:
        RecipeError: the configuration can't be built.
    """

    def __init__(self, options: Config) -> None:
        if problems := projector_problems(options):
            raise RecipeError(problems)
        super().__init__()
        self.options = options
        full: Any = resolve(options.clip)
        if options.kind == "gated_conv":
            steps = (GatedConvolution(full.dim, options.kernel) for _ in range(2 * options.units))
            self.steps = nn.ModuleList(steps)
        else:
            self.block = Block(
                full.dim, options.heads, int(full.dim * options.mlp_ratio), 1e-5, bias="all", init=truncated_normal
            )
        self.norm = nn.LayerNorm(full.dim, eps=full.norm_eps)
        self.head = Linear(full.dim, full.embedding, bias=False, init=truncated_normal)

    def forward(self, patches: Tensor, grid: Grid) -> Tensor:
        """Project patches [B, N, C], row by row on the grid, to [B, N, E], not normalised."""
        x = patches.to(self.norm.weight.dtype)
        if self.options.kind == "gated_conv":
            maps = x.unflatten(1, (grid.height, grid.width))
            for step in self.steps:
                maps = step(maps)
            x = maps.flatten(1, 2)
        else:
            x = self.block(x)
        projected: Tensor = self.head(self.norm(x))
        return projected


def projector_problems(options: Config) -> list[str]:
    """List what keeps a projector from being built."""
    if found := clip_problems(options.clip, "model.clip"):
        return found
    full: Any = resolve(options.clip)
    if options.units < 1:
        found.append(f"model.units: found {options.units}, allowed: 1 or more")
    if options.kernel < 1 or options.kernel % 2 == 0:
        found.append(f"model.kernel: found {options.kernel}, allowed: an odd number")
    if options.kind == "transformer" and (options.heads < 1 or full.dim % options.heads):
        found.append(f"model.heads: found {options.heads}, allowed: what divides the {full.dim} channels of the tower")
    if options.mlp_ratio <= 0:
        found.append(f"model.mlp_ratio: found {options.mlp_ratio:g}, allowed: more than 0")
    if not 0 <= options.surgery_blocks <= full.depth:
        found.append(
            f"model.surgery_blocks: found {options.surgery_blocks}, allowed: 0 to {full.depth}, the tower's blocks"
        )
    return found


class PatchProjectorArchitecture(Architecture):
    """A projector as a recipe describes it; its input are pictures, which the frozen tower sees first."""

    def problems(self) -> list[str]:
        if found := projector_problems(self.config):
            return found
        frames, height, width = self.input.size
        full: Any = resolve(self.config.clip)
        if frames != 1:
            found.append(f"input.frames: found {frames}, allowed: 1")
        if height % full.patch_size or width % full.patch_size:
            found.append(f"input.height={height}, input.width={width}: allowed: multiples of {full.patch_size}")
        return found

    def build(self, activation_checkpointing: Recompute = False) -> PatchProjector:
        return PatchProjector(self.config)  # four convolutions or one block: nothing worth recomputing

    def cost(self) -> Cost:
        options, (_, height, width) = self.config, self.input.size
        full: Any = resolve(options.clip)
        tokens = (height // full.patch_size) * (width // full.patch_size)
        if options.kind == "gated_conv":
            projector = 2 * options.units * tokens * (options.kernel * full.dim) ** 2
        else:
            projector = block_macs(tokens, full.dim, options.mlp_ratio)
        return Cost({"projector": float(projector), "projection": float(tokens * full.dim * full.embedding)},
                    {"all": tokens})  # fmt: skip


ARCHITECTURE = PatchProjectorArchitecture


def load_projector(model: PatchProjector, path: str, raw: Mapping[str, Tensor]) -> LoadReport:
    """Start from CLIP weights, of which norm and projection are copied; or take over a projector, official or our own.

    Args:
        model: materialised; also under ZeRO stage 3.
        path: names the weights in messages.
        raw: weights under the names that they have there.

    Raises:
        WeightsError: incomplete, or of other sizes.
    """
    state = strip_wrappers(raw)
    if any(key.startswith("projector.clip_proj.") for key in state):
        return load_state(model, from_official(state), LoadReport(path, "TagAlign"))
    if any(key.startswith(("steps.", "block.")) for key in state):
        return load_state(model, dict(state), LoadReport(path, "own"))
    found = {
        key.removeprefix("visual."): value
        for key, value in our_names(state).items()
        if key.startswith(("visual.norm.", "visual.head."))
    }
    return load_state(model, found, LoadReport(path, "CLIP"), allow_missing=("steps.*", "block.*"))


def from_official(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring an official checkpoint's projector under our names; towers, tags and scales are left out.

    Raises:
        WeightsError: a name that neither the projector nor what stands beside it has.
    """
    found = {}
    for key, value in raw.items():
        if key.startswith(OFFICIAL_OTHERS):
            continue
        name = _own_name(key.removeprefix("projector."))
        if name is None or not key.startswith("projector."):
            raise WeightsError(f"{key}: TagAlign's checkpoints have no such weight")
        # Turned: theirs multiplies from the right; a gate without dimensions gets one.
        found[name] = value.t() if name == "head.weight" else value.reshape(1) if name.endswith(".gate") else value
    return found


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring our names to those of official checkpoints."""
    found = {}
    for key, value in state.items():
        first, *rest = key.split(".")
        if first == "steps":
            half = list(OFFICIAL_HALVES)[int(rest[0]) % 2]
            part = "gate.gate" if rest[1] == "gate" else ".".join(rest[1:])
            name = f"projector.net.{int(rest[0]) // 2}.{half}.{part}"
        else:
            own = next(own for own in OFFICIAL_STEMS.values() if key.startswith(own))
            stem = next(stem for stem, one in OFFICIAL_STEMS.items() if one == own)
            name = stem + key.removeprefix(own)
        turned = value.t().contiguous() if key == "head.weight" else value
        found[f"projector.{name}"] = turned.reshape(()) if key.endswith(".gate") else turned
    return found


def _own_name(name: str) -> str | None:
    parts = name.split(".")
    if name.startswith("projector.net.") and len(parts) > 4 and parts[3] in OFFICIAL_HALVES:
        rest = "gate" if parts[4] == "gate" else ".".join(parts[4:])
        return f"steps.{2 * int(parts[2]) + OFFICIAL_HALVES[parts[3]]}.{rest}"
    stem = next((stem for stem in OFFICIAL_STEMS if name.startswith(stem)), None)
    return None if stem is None else OFFICIAL_STEMS[stem] + name.removeprefix(stem)
