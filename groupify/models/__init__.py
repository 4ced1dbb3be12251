"""A dense model from a spec: a torchvision name, ``demo``, or ``package.module:factory``."""

from groupify.models.sources import build_model, import_attribute, load_model
from groupify.models.specs import ModelSpec, Preprocessing, Source, WeightsOrigin
from groupify.models.weights import load_checkpoint

__all__ = [
    "ModelSpec",
    "Preprocessing",
    "Source",
    "WeightsOrigin",
    "build_model",
    "import_attribute",
    "load_checkpoint",
    "load_model",
]
