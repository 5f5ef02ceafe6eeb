"""The embedded data set: the 1797 handwritten digits that ship inside scikit-learn, as a TFDS builder.

It exists so that the quick start trains on real images, through the same path as ImageNet, with nothing to download.
"""

import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

_DESCRIPTION = """\
1797 grey 8x8 scans of handwritten digits: the test part of the UCI set, as distributed with scikit-learn. The counts
0..16 of the original are stretched to 0..255. Splits: `train` 1437 and `test` 360 images, stratified by class.
"""

_CITATION = """\
@misc{alpaydin1998digits,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49}
}
"""


class Digits(tfds.core.GeneratorBasedBuilder):
    """scikit-learn's `load_digits` as a TFDS data set; needs neither network nor TensorFlow.

    Features: image uint8 [8, 8, 1] (PNG), round(x * 255 / 16) of the original counts; label, one of 10 classes.
    Splits: `sklearn.model_selection.train_test_split(test_size=0.2, random_state=0, stratify=label)`: 1437 in `train`,
    360 in `test`, every class in both in the same proportion. scikit-learn names no split of its own, so figures from
    elsewhere are not comparable to the last decimal.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8, encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing to download
        images, labels, splits = _stretched()
        return {split: self._generate_examples(images, labels, indices) for split, indices in splits.items()}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> Iterator:
        for index in indices:
            # Encoded with Pillow: given an array, TFDS would encode with TensorFlow.
            png = io.BytesIO()
            Image.fromarray(images[index]).save(png, format="png")
            yield int(index), {"image": png.getvalue(), "label": int(labels[index])}


def split_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 8, 8] and labels int64 [n] of the split "train" or "test"."""
    images, labels, splits = _stretched()
    return images[splits[split]], labels[splits[split]].astype(np.int64)


def _stretched() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """All images and labels, and the indices of each split."""
    # Imported here: slow to import in every data worker.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
    return images, digits.target, {"train": train, "test": test}
