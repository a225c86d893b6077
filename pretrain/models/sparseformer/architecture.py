"""SparseFormer as a recipe describes it: what can't be built, its cost, its layers, weights of released files."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from pretrain.models.base import Classifier, Cost, Looking, MapLevel, side_problems
from pretrain.models.encoder import attention_macs, mlp_macs
from pretrain.models.recompute import Recompute
from pretrain.models.sparseformer import sparseformer_config as sizes
from pretrain.models.sparseformer.region_pictures import looks_of, region_rows, region_sheet
from pretrain.models.sparseformer.sparseformer_config import Config, UnitShape
from pretrain.models.sparseformer.sparseformer_model import MAP_STRIDE, STEM_SIDE, SparseFormer
from pretrain.models.sparseformer.sparseformer_weights import fitted_weights
from pretrain.models.sparseformer.units import MLP_RATIO

#: Part of the cost that publications leave out.
UNCOUNTED = "mixing products"
#: Parameters in front of all units.
IN_FRONT = ("feat_extractor.", "initial_roi.", "initial_embedding.")
#: Parameters that regions and points come from.
OF_REGIONS = ("initial_roi.", "roi_offset_", "roi_adjust_module.")


class SparseFormerArchitecture(Classifier):
    """A SparseFormer of images, its input clips of one frame, or of clips."""

    draws_looks = True
    official_layout = True
    any_size = True

    @staticmethod
    def resolve(config: Config) -> Config:
        return sizes.resolve(config)

    def problems(self) -> list[str]:
        small = side_problems(self.input.size, self.config.name, STEM_SIDE, "the stem's window")
        return sizes.check(self.config, self.input.size[0]) + small

    def build(self, activation_checkpointing: Recompute = False) -> SparseFormer:
        return SparseFormer(self.config, activation_checkpointing)

    def cost(self) -> Cost:
        """Count all products; publications leave those of mixing out (`UNCOUNTED`), 2 to 5 %."""
        full = sizes.resolve(self.config)
        frames, height, width = self.input.size
        pixels = frames * -(-height // 2) * -(-width // 2)
        macs = {"stem": float(pixels * 3 * 7**2 * (full.channels or 0))}
        units = sizes.layout_of(full)
        tokens = (full.tokens or 0) * full.replicates
        classes = 0
        for index, unit in enumerate(units):
            classes += int(index == sizes.constants_of(full).class_at)
            if index and unit.dim != units[index - 1].dim:
                _add(macs, {"width": tokens * units[index - 1].dim * unit.dim}, 1)
            _add(macs, unit_macs(full, unit, tokens, tokens + classes), unit.repeats)
        macs["head"] = float(units[-1].dim * (full.classes or 0))
        return Cost(macs, {"all": tokens + classes})

    def layer_of(self, name: str) -> tuple[int, int]:
        places = sizes.layer_places(sizes.layout_of(sizes.resolve(self.config)))
        last = len(places) + 1
        if name.startswith(IN_FRONT):
            return 0, last
        if name.startswith("cls_embedding."):
            return sizes.constants_of(self.config).class_at or 0, last
        if not name.startswith("layers."):
            return last, last
        # A change of width belongs to the unit in front of it.
        place = int(name.split(".")[1])
        return sum(one <= place for one in places), last

    def maps(self) -> tuple[MapLevel, ...]:
        # Of clips a task of pictures would be given times.
        dim = sizes.layout_of(sizes.resolve(self.config))[-1].dim
        return () if self.config.video else (MapLevel(dim, MAP_STRIDE),)

    def lr_scale(self, name: str) -> float:
        return float(self.config.region_lr_scale) if any(part in name for part in OF_REGIONS) else 1.0

    def decays(self, name: str, shape: Iterable[int]) -> bool:
        # Towards zero the table of regions would lead to the left upper corner.
        return not name.startswith("initial_roi.")

    def looks(self, module: SparseFormer, video: Tensor, pixels: Tensor) -> Looking:
        looks = looks_of(module, pixels)
        return Looking(region_rows(video, looks), region_sheet(video[0], looks))

    def own_weights(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        full = sizes.resolve(self.config)
        return fitted_weights(
            state, video=full.video, replicates=full.replicates, tokens=full.tokens or 0,
            spread=full.temporal_offsets == "spread",
        )  # fmt: skip


def unit_macs(config: Config, unit: UnitShape, latent: int, tokens: int) -> dict[str, float]:
    """Count multiply-accumulates of one application of a unit, by part.

    Args:
        config: full.
        unit: of it.
        latent: tokens with regions.
        tokens: these and a class token, where it is there already.
    """
    dim, points, channels = unit.dim, config.points or 0, config.channels or 0
    axes, out_points = 3 if config.video else 2, sizes.out_points_of(config)
    hidden, matrices = sizes.generator_dim_of(config, dim), channels**2 + points * out_points
    second = dim * dim if sizes.constants_of(config).adjust_hidden else 0
    counts: dict[str, dict[str, float]] = {
        "attend": {"attention": attention_macs(tokens, dim)},
        "mlp": {"MLP": mlp_macs(tokens, dim, MLP_RATIO * dim)},
        "move": {"regions": latent * (second + 2 * axes * dim)},
        "code": {"regions": latent * dim**2 * (axes - 1)},
        "sample": {
            "regions": latent * axes * points * dim * (config.offsets == "adaptive"),
            "mixing": latent * (dim * hidden + hidden * matrices + out_points * channels * dim),
            UNCOUNTED: latent * points * channels * (channels + out_points),
        },
    }
    total: dict[str, float] = {}
    for name in unit.operations:
        _add(total, counts[name], 1)
    return total


def _add(total: dict[str, float], counts: Mapping[str, float], times: int) -> None:
    for name, count in counts.items():
        total[name] = total.get(name, 0.0) + float(count * times)
