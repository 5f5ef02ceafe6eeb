"""Every key that a config has, with its default: PVT-Small on ImageNet. Other configs start from it and change keys.

"epochs" count `floor(examples / batch_size)` steps each.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of initialisation, data order, augmentation and dropout
    config.batch_size = 1024  # images per step, over all devices
    config.epochs = 300.0  # length of the run

    config.model = model = ConfigDict()
    model.name = "pvt_small"  # one of vitpyramid.list_models()
    model.num_classes = 1000  # of the data set
    model.drop_rate = 0.0  # dropout
    model.drop_path_rate = 0.1  # stochastic depth
    model.dtype = "bfloat16"  # of activations and matrix products: "bfloat16" or "float32"
    model.remat = False  # recompute blocks in the backward pass: less memory, more time
    model.scan = False  # with model.remat: compile one block a stage and loop over it; needs less memory

    config.data = data = ConfigDict()
    data.name = "imagenet2012"  # "digits" or any TFDS image classification data set
    data.data_dir = ""  # where TFDS data sets are; "" is TFDS's default, ~/tensorflow_datasets
    data.train_split = "train"  # a TFDS split, such as "train[:99%]"
    data.eval_split = "validation"  # likewise
    data.image_size = 224  # side of the network's input, in pixels
    data.crop_scale = (0.08, 1.0)  # random resized crop: share of the image's area
    data.crop_ratio = (3 / 4, 4 / 3)  # random resized crop: width / height
    data.flip = 0.5  # probability of a horizontal flip
    data.eval_crop = 0.875  # evaluation: shorter side resized to floor(image_size / eval_crop), then centre crop
    data.threads = 16  # that read and decode, in each process
    data.workers = 0  # processes that read and decode; 0: in the training process

    config.optim = optim = ConfigDict()  # AdamW
    optim.lr = 5e-4  # peak learning rate for a batch of lr_batch; it grows with the batch
    optim.lr_batch = 512  # 0: optim.lr is absolute
    optim.beta1 = 0.9  # decay of the gradient's moving average
    optim.beta2 = 0.999  # decay of the squared gradient's
    optim.eps = 1e-8  # added to the root of the latter
    optim.weight_decay = 0.05  # not on vectors, nor on what the model excludes
    optim.clip_norm = 0.0  # largest global norm of the gradient; 0: no clipping

    config.schedule = schedule = ConfigDict()  # linear warm-up, then cosine
    schedule.warmup_epochs = 5.0  # length of the warm-up
    schedule.warmup_lr = 1e-6  # at step 0
    schedule.min_lr = 1e-5  # at the end

    config.loss = ConfigDict()
    config.loss.label_smoothing = 0.1  # probability spread evenly over all classes

    config.ema = ConfigDict()
    config.ema.decay = 0.0  # moving average of the weights, evaluated beside them; 0: none

    config.mesh = ConfigDict()
    config.mesh.fsdp = 1  # devices over which parameters are split; the others hold copies. All split the batch

    config.log = ConfigDict()
    config.log.every_steps = 50  # between lines of progress

    config.eval = ConfigDict()
    config.eval.batch_size = 1024  # over all devices
    config.eval.every_epochs = 1.0  # and at the end

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1.0  # and at the end
    config.checkpoint.keep = 2  # newest ones kept

    config.compile_cache = "auto"  # folder of compiled programs; "auto": the user's cache folder; "": none
    return config.lock()
