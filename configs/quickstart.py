"""A small PVT on scikit-learn's handwritten digits: the whole program on real images, on a CPU, in minutes.

1437 training images, 360 test images (stratified split, see `vitpyramid/data/digits.py`), nothing to download.

    python main.py --config=configs/quickstart.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.batch_size = 64
    config.epochs = 40.0

    config.model.name = "pvt_micro"
    config.model.num_classes = 10
    config.model.dtype = "float32"

    config.data.name = "digits"
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.crop_scale = (0.6, 1.0)
    config.data.flip = 0.0  # a mirrored digit is another sign
    config.data.eval_crop = 1.0
    config.data.threads = 2

    config.optim.lr = 1e-3
    config.optim.lr_batch = 0
    config.optim.clip_norm = 1.0

    config.schedule.warmup_epochs = 2.0

    config.eval.batch_size = 120
    config.eval.every_epochs = 10.0
    config.checkpoint.every_epochs = 10.0
    return config
