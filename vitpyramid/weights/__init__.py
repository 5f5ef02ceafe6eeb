"""Weights in from PyTorch and out again, without PyTorch."""

from vitpyramid.weights.dense_names import flax_to_torch, torch_to_flax
from vitpyramid.weights.pretrained import load_pretrained
from vitpyramid.weights.reader import UnsafeFileError, read_torch_file

__all__ = ["UnsafeFileError", "flax_to_torch", "load_pretrained", "read_torch_file", "torch_to_flax"]
