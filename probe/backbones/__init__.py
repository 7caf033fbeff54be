"""Backbones: the Flax towers, and their weights and preprocessing from published checkpoints."""

from probe.backbones.backbone import Backbone, build_tower, normalize_pixels
from probe.backbones.checkpoint import load_backbone, save_backbone
from probe.backbones.embedding import make_embed_fn
from probe.backbones.resnet import ResNet, ResNetConfig
from probe.backbones.tower import TowerOutput
from probe.backbones.vit import VisionTower, ViTConfig

__all__ = [
    "Backbone",
    "ResNet",
    "ResNetConfig",
    "TowerOutput",
    "ViTConfig",
    "VisionTower",
    "build_tower",
    "load_backbone",
    "make_embed_fn",
    "normalize_pixels",
    "save_backbone",
]
