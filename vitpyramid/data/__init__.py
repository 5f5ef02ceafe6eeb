"""Where batches come from: TFDS data sets, folders and COCO's JSON, through Grain, no TensorFlow in the process."""

from vitpyramid.data.annotated import Annotated, open_annotated
from vitpyramid.data.pipeline import BatchIterator, EvalBatches, make_eval, make_train
from vitpyramid.data.source import Source, open_source

__all__ = [
    "Annotated",
    "BatchIterator",
    "EvalBatches",
    "Source",
    "make_eval",
    "make_train",
    "open_annotated",
    "open_source",
]
