"""EVAD: one ViT finds persons on a clip's keyframe and tells their actions (Chen et al. 2023; systems/evad.md)."""

from pretrain.models.evad.detector import ARCHITECTURE
from pretrain.models.evad.detector_config import Config

__all__ = ["ARCHITECTURE", "Config"]
