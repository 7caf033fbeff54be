"""probe: turn a pretrained vision backbone into a classifier that one can trust.

The public names live here and are imported when first used (PEP 562), so importing `probe` loads no jax.
Everything that is not listed here may change.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers and editors; a test holds the two lists together
    from probe.backbones import Backbone as Backbone
    from probe.backbones import TextEncoder as TextEncoder
    from probe.backbones import load_backbone as load_backbone
    from probe.backbones import load_text_encoder as load_text_encoder
    from probe.backbones import normalize_pixels as normalize_pixels
    from probe.backbones import save_backbone as save_backbone
    from probe.bundle import load as load_run
    from probe.cache import Cache as Cache
    from probe.compare import compare as compare_runs
    from probe.config import CompareConfig as CompareConfig
    from probe.config import EmbedConfig as EmbedConfig
    from probe.config import ExportConfig as ExportConfig
    from probe.config import FinetuneConfig as FinetuneConfig
    from probe.config import FitLinearConfig as FitLinearConfig
    from probe.config import PredictConfig as PredictConfig
    from probe.config import ZeroShotConfig as ZeroShotConfig
    from probe.embed import embed as embed_images
    from probe.errors import ProbeError as ProbeError
    from probe.estimator import LinearProbe as LinearProbe
    from probe.export import export as export_run
    from probe.exporting.numpy_head import NumpyHead as NumpyHead
    from probe.finetune import finetune as finetune_images
    from probe.heads import Classifier as Classifier
    from probe.linear import fit_linear as fit_linear
    from probe.predict import predict as predict_images
    from probe.training.optim import partition as partition
    from probe.zero_shot import zero_shot as zero_shot_images

# A verb's function has its module's name, and `import probe.embed` would put the module here under that name:
# hence embed_images.
_HOMES = {
    "Backbone": ("probe.backbones", "Backbone"),
    "Cache": ("probe.cache", "Cache"),
    "Classifier": ("probe.heads", "Classifier"),
    "CompareConfig": ("probe.config", "CompareConfig"),
    "EmbedConfig": ("probe.config", "EmbedConfig"),
    "ExportConfig": ("probe.config", "ExportConfig"),
    "FinetuneConfig": ("probe.config", "FinetuneConfig"),
    "FitLinearConfig": ("probe.config", "FitLinearConfig"),
    "LinearProbe": ("probe.estimator", "LinearProbe"),
    "NumpyHead": ("probe.exporting.numpy_head", "NumpyHead"),
    "PredictConfig": ("probe.config", "PredictConfig"),
    "ProbeError": ("probe.errors", "ProbeError"),
    "TextEncoder": ("probe.backbones", "TextEncoder"),
    "ZeroShotConfig": ("probe.config", "ZeroShotConfig"),
    "compare_runs": ("probe.compare", "compare"),
    "embed_images": ("probe.embed", "embed"),
    "export_run": ("probe.export", "export"),
    "finetune_images": ("probe.finetune", "finetune"),
    "fit_linear": ("probe.linear", "fit_linear"),
    "load_backbone": ("probe.backbones", "load_backbone"),
    "load_text_encoder": ("probe.backbones", "load_text_encoder"),
    "load_run": ("probe.bundle", "load"),
    "normalize_pixels": ("probe.backbones", "normalize_pixels"),
    "partition": ("probe.training.optim", "partition"),
    "predict_images": ("probe.predict", "predict"),
    "save_backbone": ("probe.backbones", "save_backbone"),
    "zero_shot_images": ("probe.zero_shot", "zero_shot"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'probe' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
