"""PVT, PiT, T2T-ViT and ResT in JAX, exact to the papers' released PyTorch code."""

from vitpyramid.models.registry import create_model, list_models

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "list_models"]
