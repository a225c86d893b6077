"""SparseFormer, of images and clips (Gao et al. 2023; systems/sparseformer.md, sparseformer_bootstrap.md)."""

from pretrain.models.sparseformer.architecture import SparseFormerArchitecture as ARCHITECTURE
from pretrain.models.sparseformer.sparseformer_config import Config

__all__ = ["ARCHITECTURE", "Config"]
