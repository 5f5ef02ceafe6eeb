"""PVT, PiT, T2T-ViT and ResT in JAX, exact to the papers' released PyTorch code."""

__version__ = "0.1.0"

from vitpyramid.convert import load_pretrained
from vitpyramid.models.registry import create_model, list_models

__all__ = ["__version__", "create_model", "list_models", "load_pretrained"]
