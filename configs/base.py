"""Every key that a config has, with its default: PVT-Small on ImageNet. Other configs start from it and change keys.

"epochs" count `floor(examples / batch_size)` steps each, or as `schedule.round_up` says.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = "classify"  # what is learned: "classify", "detect" or "segment"
    config.seed = 0  # of initialisation, data order, augmentation and dropout
    config.batch_size = 1024  # images per step, over all devices
    config.epochs = 300.0  # length of the run
    config.init = ""  # weights to start from: converted ones, a work directory, a PyTorch file; "": none

    config.model = model = ConfigDict()
    model.name = "pvt_small"  # one of vitpyramid.list_models()
    model.backbone = ""  # of a network for dense prediction, another one than its own; "": its own
    model.num_classes = 1000  # of the data set; 0: as many as it has
    model.drop_rate = 0.0  # dropout
    model.drop_path_rate = 0.1  # stochastic depth
    model.token_drop_rate = 0.1  # dropout of the performer in T2T-ViT's token module; no other network has it
    model.freeze_statistics = False  # batch norm, where there is any, keeps to its running statistics in training
    model.dtype = "bfloat16"  # of activations and matrix products, or "float32"
    model.remat = False  # recompute blocks in the backward pass: less memory, more time
    model.scan = False  # with model.remat: compile one block a stage and loop over it; needs less memory

    config.data = data = ConfigDict()
    data.name = "imagenet2012"  # "digits", "folder", "synthetic", or any TFDS image classification data set
    data.data_dir = ""  # where TFDS data sets are ("": ~/tensorflow_datasets), or the folder of SPLIT/CLASS/image files
    data.train_split = "train"  # a TFDS split, such as "train[:99%]"
    data.eval_split = "validation"  # likewise
    data.image_size = 224  # side of the network's input, in pixels
    data.crop_scale = (0.08, 1.0)  # random resized crop: share of the image's area
    data.crop_ratio = (3 / 4, 4 / 3)  # random resized crop: width / height
    data.crop_padding = 0  # > 0: resize to image_size and crop from an image padded so, instead of the above
    data.flip = 0.5  # probability of a horizontal flip
    data.interpolation = "bicubic"  # of training crops: "bicubic", "bilinear", "random" for either; "opencv" with boxes
    data.auto_augment = ""  # "rand-m9-mstd0.5-inc1" (RandAugment), "3a" (3-Augment), "original", "v0"; "": none
    data.color_jitter = 0.0  # strength of brightness, contrast, saturation changes; without auto_augment, or with "3a"
    data.repeats = 1  # times that an image comes, augmented anew each time, in one batch
    data.eval_crop = 0.875  # evaluation: shorter side resized to floor(image_size / eval_crop), then centre crop
    data.eval_interpolation = "bicubic"  # of that resize: "bicubic" or "bilinear"
    data.on_corrupt = "error"  # an image that cannot be read ends the run; "skip": is replaced, and counted
    data.mean = ()  # of the channels, in [0, 1], for normalising; (): the model's
    data.std = ()  # likewise
    data.threads = 16  # that read and decode, in each process
    data.workers = 0  # processes that read and decode; 0: in the training process
    # Of detection and segmentation. Heights and widths are in pixels.
    data.channels = "rgb"  # order of the channels that the network takes, and of data.mean and std; or "bgr"
    data.resize = "mmdet"  # whose rounding of new sizes: "mmdet", "detectron2" or "detr"
    data.short_side = (800,)  # what an image's shorter side becomes, one of these
    data.short_side_range = False  # any whole number from the smallest to the largest of them
    data.long_side = 1333  # what the longer side may not exceed
    data.scale_range = (1.0, 1.0)  # of a random factor of both
    data.crop_short_side = ()  # with boxes: half of the images become so short, a part is cut out and resized as above
    data.crop_side = (384, 600)  # least and largest height and width of that part
    data.canvas = ((800, 1344), (1344, 800))  # (height, width) to pad images to; (): as many as there are sizes
    data.max_boxes = 100  # of an image that are learned; others are counted
    data.masks = False  # of every box are learned
    data.crop = False  # a random part, as large as the one canvas
    data.cat_max_ratio = 1.0  # crops are drawn again until no class has as large a share; 1: once
    data.photometric = False  # random brightness, contrast, saturation and hue
    data.eval_short_side = 800  # evaluation, as data.short_side; longer sides as in training
    data.eval_align = 1  # evaluation: sides are rounded up to multiples of this
    data.eval_canvas = ((800, 1344), (1344, 800))  # likewise

    config.mix = mix = ConfigDict()  # images mixed with those of the reversed group, on the device
    mix.groups = 1  # runs of rows, each drawn for and mixed by itself, as the processes of the authors; 1: the batch
    mix.mixup = 0.0  # alpha of mixup's Beta distribution; 0: no mixup
    mix.cutmix = 0.0  # likewise of CutMix
    mix.prob = 1.0  # of mixing at all
    mix.switch_prob = 0.5  # of CutMix where both are on
    mix.mode = "batch"  # draws are for a group ("batch"), for each "pair" that exchanges, or for each image: "elem"
    mix.before_normalise = False  # on rounded pixels and before erasing, as T2T-ViT; else after both

    config.erase = erase = ConfigDict()  # random erasing, on the device
    erase.prob = 0.0  # of erasing in an image
    erase.mode = "pixel"  # noise for each "pixel", one colour ("rand"), or the mean colour ("const")
    erase.count = 1  # boxes at most

    config.optim = optim = ConfigDict()
    optim.name = "adamw"  # "adamw", "adamp" or "sgd"
    optim.lr = 5e-4  # peak learning rate for a batch of lr_batch; it grows with the batch
    optim.lr_batch = 512  # 0: optim.lr is absolute
    optim.beta1 = 0.9  # decay of the gradient's moving average
    optim.beta2 = 0.999  # decay of the squared gradient's
    optim.eps = 1e-8  # added to the root of the latter
    optim.momentum = 0.9  # of "sgd"
    optim.weight_decay = 0.05  # not on vectors, nor on what the model excludes
    optim.decay_vectors = False  # decay everything
    optim.decay_norms = True  # with decay_vectors: norms too
    optim.clip_norm = 0.0  # largest global norm of the gradient; 0: no clipping
    optim.accumulate = 1  # parts of a batch that go through the network one after another: less memory
    optim.layer_decay = 1.0  # factor of the learning rate for every layer further from the head
    optim.lr_rules = ()  # (pattern, factor) pairs: peak learning rate by path of the parameter; 0 freezes; (): all 1

    config.schedule = schedule = ConfigDict()  # linear warm-up, then:
    schedule.name = "cosine"  # "cosine", "constant", "step" or "poly"
    schedule.drops = ()  # of "step": epochs from which the rate is a tenth
    schedule.power = 0.9  # of "poly"
    schedule.per = "step"  # the rate changes every "step" or every "epoch"
    schedule.round_up = False  # an epoch counts its last, partial batch; the stream fills it from the next epoch
    schedule.lag = 0  # with "epoch": 1 to change the rate one epoch late, as DeiT's trainer does
    schedule.warmup_epochs = 5.0  # length of the warm-up
    schedule.warmup_lr = 1e-6  # at step 0
    schedule.min_lr = 1e-5  # at the end
    schedule.cooldown_epochs = 0.0  # at min_lr, after "cosine" or "poly"; part of config.epochs
    schedule.scale_ends = False  # warmup_lr and min_lr grow with the batch as well

    config.loss = ConfigDict()
    config.loss.images_per_group = 0  # detection: images that share a divisor, as a process of the authors; 0: all
    config.loss.label_smoothing = 0.1  # probability spread evenly over all classes

    config.ema = ConfigDict()
    config.ema.decay = 0.0  # moving average of the weights, evaluated beside them; 0: none
    config.ema.warmup = False  # a shorter average at first: decay at most (1 + step) / (10 + step)

    config.distill = distill = ConfigDict()
    distill.teacher = ""  # weights of a teacher, as config.init; "": no distillation
    distill.model = ""  # its name, one of vitpyramid.list_models(); "": recognised
    distill.kind = "hard"  # its decision as a label, or "soft": its distribution
    distill.alpha = 0.5  # share of the teacher's loss
    distill.tau = 1.0  # temperature of "soft"

    config.mesh = ConfigDict()
    config.mesh.fsdp = 1  # devices over which parameters are split; the others hold copies. All split the batch

    config.log = ConfigDict()
    config.log.every_steps = 50  # between lines of progress

    config.profile = ConfigDict()  # of some steps, for XProf; it lies in the workdir under tensorboard
    config.profile.start = 10  # steps that the process takes before it
    config.profile.steps = 0  # that are traced; 0: none

    config.eval = ConfigDict()
    config.eval.batch_size = 1024  # over all devices
    config.eval.every_epochs = 1.0  # and at the end

    config.checkpoint = ConfigDict()
    config.checkpoint.every_epochs = 1.0  # and at the end
    config.checkpoint.keep = 2  # newest ones kept

    config.compile_cache = "auto"  # folder of compiled programs; "auto": the user's cache folder; "": none
    return config.lock()
