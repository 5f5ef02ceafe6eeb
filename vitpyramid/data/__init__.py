"""Where batches come from: TFDS data sets and class folders, through Grain, no TensorFlow in the process."""

from vitpyramid.data.pipeline import BatchIterator, EvalBatches, make_eval, make_train
from vitpyramid.data.source import Source, open_source

__all__ = ["BatchIterator", "EvalBatches", "Source", "make_eval", "make_train", "open_source"]
