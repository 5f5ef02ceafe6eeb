"""torchvision's names where it has none of its compiled operators: enough to import what is built on it."""

import contextlib
import functools

import torch


@functools.cache  # operators go away with their library
def declare() -> torch.library.Library:
    """Declares what is missing; nothing can be computed with it."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    differentiable = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
    for name in ("nms", "qnms", *differentiable, *(f"_{name}_backward" for name in differentiable)):
        with contextlib.suppress(RuntimeError):  # it is there already
            library.define(f"{name}(Tensor x) -> Tensor")
    return library
