"""Weights in from PyTorch and out again."""

from vitpyramid.convert.names import flax_to_torch, torch_to_flax

__all__ = ["flax_to_torch", "torch_to_flax"]
