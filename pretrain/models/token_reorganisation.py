"""Fewer tokens on the way through a ViT (EViT, Liang et al. 2022; systems/evit.md).

In chosen blocks, between attention and MLP, the tokens that get the least attention are dropped, or fused into one.
There are no new parameters: a checkpoint trained without it runs at any keep rate. The score of a token is the class
token's attention to it (`class`, exact EViT), or for models without a class token the attention that it receives from
all tokens (`received`); `keyframe` keeps all tokens of the middle time slice besides (EVAD, Chen et al. 2023;
systems/evad.md). Shapes: B samples, n tokens, c of them class tokens in front, h heads, d channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from pretrain.errors import RecipeError
from pretrain.models.cubes import complement, take_tokens
from pretrain.models.keep_rates import Reorganisation, scheduled_rate, tokens_kept
from pretrain.models.recompute import Recompute, maybe_recompute
from pretrain.models.token_scores import class_attention, received_attention

Kind = Literal["class", "received", "keyframe"]


@dataclass
class Step:
    """Record of one block: indices count the tokens that came into it, without class tokens."""

    block: int
    score: Tensor
    """[B, n]"""
    kept: Tensor
    """[B, k], highest score first (with `per_frame`: slice by slice; with `in_order`: ascending)"""
    dropped: Tensor
    """[B, n-k], ascending"""


@dataclass
class Tokens:
    """Tokens behind the last block."""

    x: Tensor
    """[B, c+n, C]"""
    sizes: Tensor | None = None
    """[B, n] original tokens that each one stands for; None: one each"""
    origin: Tensor | None = None
    """[B, n] index of the original token, -1 for a fused one; None: all are there, in order"""
    steps: list[Step] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    """tokens behind the blocks that were asked for"""


class TokenReorganisation:
    """Run of blocks that drops tokens between attention and MLP of some; holds no parameters.

    Args:
        rates: keep rate of each block, 1 where nothing is dropped.
        score: `class` needs exactly one class token in front; `received` takes any model, `keyframe` one with slices.
        config: fusing and stratification; its rate and blocks are not read, `rates` says them.
        in_order: kept tokens stay in the order of their places instead of coming highest score first.

    Attributes:
        rate: keep rate of the dropping blocks from now on; None: as constructed. Set by a schedule while training.
    """

    def __init__(self, rates: Sequence[float], score: Kind, config: Reorganisation, in_order: bool = False) -> None:
        self.rates = tuple(float(rate) for rate in rates)
        self.score = score
        self.config = config
        self.in_order = in_order
        self.rate: float | None = None

    def set_step(self, step: int, steps_per_epoch: int) -> None:
        """Set `rate` for an optimiser step, counted from 0, by the configured schedule; evaluation then uses it too."""
        config = self.config
        self.rate = scheduled_rate(config.keep_rate, step, steps_per_epoch, config.start_epoch, config.shrink_epochs)

    def run(
        self,
        blocks: nn.ModuleList,
        x: Tensor,
        class_tokens: int = 0,
        slices: int = 1,
        keep_rate: float | Sequence[float] | None = None,
        counts: int | Sequence[int | None] | None = None,
        recompute: Recompute = False,
        outputs: Sequence[int] = (),
    ) -> Tokens:
        """Run tokens [B, c+n, C] through all blocks.

        Args:
            blocks: the model's blocks.
            x: tokens, the class tokens in front.
            class_tokens: c.
            slices: time slices that the other tokens are ordered by, T'; used with `per_frame` and `keyframe`.
            keep_rate: of this call, one number or one a block; acts only in dropping blocks and only below 1.
            counts: tokens to keep, one number or one a block (None: by rate); acts in any block.
            recompute: activation checkpointing.
            outputs: blocks, ascending, whose tokens are returned too.
        """
        if self.score == "class" and class_tokens != 1:
            raise RecipeError("token reorganisation by class attention needs a class token; use score `received`")
        if self.score == "keyframe" and slices < 2:
            raise RecipeError("token reorganisation around a keyframe needs clips of two time slices or more")
        state = self._start(x, class_tokens, slices)
        held = state.x.shape[1] // slices if self.score == "keyframe" else 0
        fused = 0
        for index, block in enumerate(blocks):
            tokens = state.x.shape[1] - class_tokens
            kept = self._kept(index, tokens - (fused if self.config.per_frame else 0), slices, keep_rate, counts)
            if kept is None:
                state.x = maybe_recompute(recompute, block, state.x)
            elif kept <= held:
                raise RecipeError(f"block {index}: {kept} of {tokens} tokens leave none beside the keyframe's {held}")
            else:
                strata = slices if self.config.per_frame else 1
                reduction = _Reduction(
                    self.config, self.score, index, class_tokens, strata, fused, kept, held, self.in_order
                )
                state.x, step = maybe_recompute(recompute, block, state.x, reduction)
                self._account(state, step)
                fused = int(self.config.fuse)
            if index in outputs:
                state.outputs.append(state.x)
        return state

    def _start(self, x: Tensor, class_tokens: int, slices: int) -> Tokens:
        """Begin with all tokens; around a keyframe its slice comes first, as in EVAD, then the others in order."""
        tokens = x.shape[1] - class_tokens
        origin = torch.arange(tokens, device=x.device)
        if self.score == "keyframe":
            times = origin.reshape(slices, -1)
            middle = slices // 2
            origin = torch.cat((times[middle : middle + 1], times[:middle], times[middle + 1 :])).flatten()
            # In front, so that later blocks find the keyframe by its number of tokens, whatever was dropped behind it.
            x = torch.cat((x[:, :class_tokens], x[:, class_tokens:][:, origin]), dim=1)
        origin = origin.expand(x.shape[0], -1)
        return Tokens(x, torch.ones(origin.shape, device=x.device), origin)

    def _kept(
        self,
        index: int,
        tokens: int,
        slices: int,
        keep_rate: float | Sequence[float] | None,
        counts: int | Sequence[int | None] | None,
    ) -> int | None:
        """Count the tokens to keep in block `index`, a multiple of the slices where stratified; None: all."""
        count = counts[index] if isinstance(counts, Sequence) else counts
        rate = keep_rate[index] if isinstance(keep_rate, Sequence) else keep_rate
        rate = self.rate if rate is None else rate
        rate = self.rates[index] if rate is None else rate
        # A schedule's rate acts in dropping blocks alone, so that its 1 is the plain model.
        if count is None and not (self.rates[index] < 1 and rate < 1):
            return None
        slices = slices if self.config.per_frame else 1
        if count is not None:
            if not 1 <= count <= tokens or count % slices:
                raise RecipeError(f"block {index}: can't keep {count} of {tokens} tokens in {slices} slices")
            kept = count
        else:
            kept = tokens_kept(tokens // slices, rate) * slices
        return None if kept == tokens else kept

    def _account(self, state: Tokens, step: Step) -> None:
        state.steps.append(step)
        assert state.sizes is not None and state.origin is not None
        sizes, origin = state.sizes.gather(1, step.kept), state.origin.gather(1, step.kept)
        if self.config.fuse:
            # The sum of sizes, not their number: an older fused token among the dropped ones stands for many.
            merged = state.sizes.gather(1, step.dropped).sum(1, keepdim=True)
            sizes = torch.cat((sizes, merged), dim=1)
            origin = torch.cat((origin, torch.full_like(origin[:, :1], -1)), dim=1)
        state.sizes, state.origin = sizes, origin


@dataclass(frozen=True)
class _Reduction:
    """Reduction of one block, see `vit.Reduction`: class tokens stay, then slices, then at most one fused token.

    Of the others the first `held` stay, those of the keyframe; they count among the `kept` ones.
    """

    config: Reorganisation
    kind: Kind
    block: int
    class_tokens: int
    slices: int
    fused: int
    kept: int
    held: int = 0
    in_order: bool = False

    def score(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Score tokens [B, c+n], float32: in half precision ties are common, and their order depends on the device."""
        # Autocast would turn the products back into half precision.
        with torch.autocast(query.device.type, enabled=False):
            if self.kind == "class":
                return class_attention(query.float(), key.float(), scale)
            weight = None
            if self.held:
                weight = torch.ones(query.shape[2], device=query.device)
                weight[self.class_tokens : self.class_tokens + self.held] = self.config.keyframe_weight
            return received_attention(query.float(), key.float(), scale, weight)

    def take(self, x: Tensor, score: Tensor) -> tuple[Tensor, Step]:
        """Put together class tokens, kept tokens and the fused one."""
        score = score[:, self.class_tokens :]
        head, rest = x[:, : self.class_tokens], x[:, self.class_tokens :]
        # Indices have no gradient; it reaches the scores through the fused token's weights alone.
        kept = self._choose(score.detach())
        dropped = complement(kept, rest.shape[1])
        parts = [head, take_tokens(rest, kept)]
        if self.config.fuse:
            # No detach and no normalisation: gradients reach the attention through the weights, as officially.
            weights = score.gather(1, dropped)
            if self.config.fuse_norm:
                weights = weights / weights.sum(1, keepdim=True)
            fused = torch.einsum("bn,bnc->bc", weights, take_tokens(rest, dropped).float())
            parts.append(fused[:, None].to(x.dtype))
        return torch.cat(parts, dim=1), Step(self.block, score.detach(), kept, dropped)

    def _choose(self, score: Tensor) -> Tensor:
        """Choose the kept tokens [B, k]. In slices, a fused token from before is fused again: it belongs to none."""
        if self.held:
            best = self._best(score[:, self.held :], self.kept - self.held) + self.held
            first = torch.arange(self.held, device=score.device).expand(len(score), -1)
            return torch.cat((first, best), dim=1)
        if self.slices == 1:
            return self._best(score, self.kept)
        sliced = score[:, : score.shape[1] - self.fused].unflatten(1, (self.slices, -1))
        best = sliced.topk(self.kept // self.slices, dim=2, sorted=True).indices
        first = torch.arange(self.slices, device=score.device)[:, None] * sliced.shape[2]
        return (best + first).flatten(1)

    def _best(self, score: Tensor, count: int) -> Tensor:
        """Choose the `count` highest scores of [B, n]."""
        best = score.topk(count, dim=1, sorted=True).indices
        return best.sort(dim=1).values if self.in_order else best
