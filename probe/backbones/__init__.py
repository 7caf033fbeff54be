"""Backbones: the Flax towers, for images and texts, with weights and preprocessing from published checkpoints."""

from probe.backbones.backbone import Backbone, build_tower, normalize_pixels
from probe.backbones.checkpoint import load_backbone, save_backbone
from probe.backbones.embedding import int8_precision, make_embed_fn
from probe.backbones.precision import Precision
from probe.backbones.resnet import ResNet, ResNetConfig
from probe.backbones.text import TextConfig, TextTower
from probe.backbones.text_encoder import TextEncoder, load_text_encoder
from probe.backbones.tower import TowerOutput
from probe.backbones.vit import VisionTower, ViTConfig

__all__ = [
    "Backbone",
    "Precision",
    "ResNet",
    "ResNetConfig",
    "TextConfig",
    "TextEncoder",
    "TextTower",
    "TowerOutput",
    "ViTConfig",
    "VisionTower",
    "build_tower",
    "int8_precision",
    "load_backbone",
    "load_text_encoder",
    "make_embed_fn",
    "normalize_pixels",
    "save_backbone",
]
