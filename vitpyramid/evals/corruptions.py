"""The 15 corruptions of ImageNet-C at five severities, and the mean corruption error.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019,
arXiv 1903.12261; parameters and formulas as in `ImageNet-C/create_c/make_imagenet_c.py` of
github.com/hendrycks/robustness, commit e0377d46, without OpenCV and ImageMagick, which that uses:

* Motion blur and snow's use ImageMagick's formula in floating point: with its output cut to whole levels the pixels are
  those of ImageMagick 6.9.11's `convert -motion-blur`, at the five severities' settings and eight angles.
* Elastic's affine map interpolates exactly; OpenCV does so in steps of 1/32 pixel.
* Frost lays published photographs over the image (frost1.png ... frost5.jpg of that repository); they are not part of
  this package. Without them there is no frost, and the mean is of 14 corruptions, which is not the published mCE.

Results stay in memory. The published files were saved as JPEG of quality 85, which is one more corruption: errors on
them are a little higher. Draws are numpy's of today, so single images differ from the published ones.

The parameters are made for 224 x 224. At other sizes blurs keep theirs in pixels; elastic's grow with the shorter side.
"""

import functools
import io
import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.ndimage
import scipy.signal
from PIL import Image

SEVERITIES = (1, 2, 3, 4, 5)
_UNIT = 224  # side of the images that the parameters are made for


def gaussian_noise(x, rng, scale):
    return x + rng.normal(0, scale, x.shape)


def shot_noise(x, rng, photons):
    return rng.poisson(x * photons) / photons


def impulse_noise(x, rng, amount):
    """Salt and pepper, half each, by channel."""
    salt, hit = rng.random(x.shape) < 0.5, rng.random(x.shape) <= amount
    return np.where(hit, salt, x)


def defocus_blur(x, rng, radius, alias_blur):
    kernel = disk(radius, alias_blur)
    reach = len(kernel) // 2
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), "reflect")
    return scipy.signal.fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))


def disk(radius: int, alias_blur: float) -> np.ndarray:
    """A disk, of sum 1 before its edge is blurred by a Gaussian of 3 taps, or of 5 beyond a radius of 8."""
    reach, taps = max(8, radius), 3 if radius <= 8 else 5
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    inside = (x**2 + y**2 <= radius**2) / np.sum(x**2 + y**2 <= radius**2)
    weights = np.exp(-((np.arange(taps) - taps // 2) ** 2) / (2 * alias_blur**2))
    for axis in (0, 1):
        inside = scipy.ndimage.correlate1d(inside, weights / weights.sum(), axis, mode="mirror")
    return inside


def glass_blur(x, rng, sigma, reach, rounds):
    x = np.uint8(_gaussian(x, sigma) * 255)
    shifts = rng.integers(-reach, reach, (rounds, *x.shape[:2], 2))
    return _gaussian(_shuffle(x, shifts, reach) / 255, sigma)


def _shuffle(x, shifts, reach):
    """Each pixel, from the last to the first, becomes the neighbour that is `shifts [rounds, H, W, 2]` (x, y) away.

    Official code writes a swap, of which numpy's views make a copy: the neighbour keeps its own value.
    """
    height, width = x.shape[:2]
    rows, columns = np.mgrid[height - reach : reach : -1, width - reach : reach : -1]
    place = list(range(height * width))
    for right, down in np.moveaxis(shifts, -1, 1):
        neighbours = (rows + down[rows, columns]) * width + columns + right[rows, columns]
        for here, there in zip((rows * width + columns).ravel().tolist(), neighbours.ravel().tolist(), strict=True):
            place[here] = place[there]
    return x.reshape(-1, x.shape[2])[place].reshape(x.shape)


def motion_blur(x, rng, radius, sigma):
    return _motion(x, radius, sigma, rng.uniform(-45, 45))


def _motion(x, radius: int, sigma: float, angle: float) -> np.ndarray:
    """ImageMagick's: half a Gaussian along a line of whole pixels; beyond the border the outermost counts."""
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    height, width = x.shape[:2]
    out = np.zeros_like(x)
    for i, weight in enumerate(weights):
        down, right = (
            math.ceil(i * part - 0.5) for part in (math.sin(math.radians(angle)), math.cos(math.radians(angle)))
        )
        rows = np.clip(np.arange(height) + down, 0, height - 1)
        columns = np.clip(np.arange(width) + right, 0, width - 1)
        out += weight * x[rows][:, columns]
    return out


def zoom_blur(x, rng, last, step):
    factors = np.arange(1, last, step)
    return (x + sum(_zoom(x, factor) for factor in factors)) / (len(factors) + 1)


def _zoom(x, factor: float) -> np.ndarray:
    """The centre of a map `[H, W, C]` enlarged to its size."""
    cut = [math.ceil(side / factor) for side in x.shape[:2]]
    top, left = ((side - part) // 2 for side, part in zip(x.shape, cut, strict=False))
    large = scipy.ndimage.zoom(x[top : top + cut[0], left : left + cut[1]], (factor, factor, 1), order=1)
    top, left = ((large.shape[axis] - x.shape[axis]) // 2 for axis in (0, 1))
    return large[top : top + x.shape[0], left : left + x.shape[1]]


def snow(x, rng, mean, scale, zoom, threshold, radius, sigma, kept):
    layer = _zoom(rng.normal(mean, scale, x.shape[:2])[..., None], zoom)
    layer = np.where(layer < threshold, 0, layer)
    layer = _motion(np.floor(np.clip(layer, 0, 1) * 255) / 255, radius, sigma, rng.uniform(-135, -45))
    grey = (x @ [0.299, 0.587, 0.114])[..., None]
    return kept * x + (1 - kept) * np.maximum(x, grey * 1.5 + 0.5) + layer + np.rot90(layer, 2)


def frost(x, rng, kept, share, pictures=()):
    """`pictures`: uint8 RGB, larger than the image; of the first five, for official code never draws the sixth."""
    picture = pictures[rng.integers(min(5, len(pictures)))]
    top, left = (rng.integers(large - side) for large, side in zip(picture.shape[:2], x.shape[:2], strict=True))
    return kept * x + share * picture[top : top + x.shape[0], left : left + x.shape[1]] / 255


def fog(x, rng, strength, decay):
    side = 1 << (max(x.shape[:2]) - 1).bit_length()
    layer = plasma(side, decay, rng)[: x.shape[0], : x.shape[1], None]
    return (x + strength * layer) * x.max() / (x.max() + strength)


def plasma(side: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """A cloud `[side, side]` in `[0, 1]` by the diamond-square algorithm; `side` is a power of 2."""
    field, step, wobble = np.zeros((side, side)), side, 100.0

    def noisy(total):
        return total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corners = field[::step, ::step]
        across = corners + np.roll(corners, -1, 0)
        field[half::step, half::step] = noisy(across + np.roll(across, -1, 1))
        centres = field[half::step, half::step]
        # The corners' neighbours are official code's: those of the other direction would be nearer.
        field[::step, half::step] = noisy(centres + np.roll(centres, 1, 0) + corners + np.roll(corners, -1, 0))
        field[half::step, ::step] = noisy(centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 1))
        step, wobble = half, wobble / decay
    return (field - field.min()) / np.ptp(field)


def brightness(x, rng, more):
    """HSV's value is the largest channel: hue and saturation stay where all channels are multiplied alike."""
    value = x.max(-1, keepdims=True)
    raised = np.clip(value + more, 0, 1)
    return np.where(value > 0, x * raised / np.where(value > 0, value, 1), raised)


def contrast(x, rng, kept):
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * kept + mean


def elastic_transform(x, rng, strength, sigma, shift):
    height, width = x.shape[:2]
    unit = min(height, width) / _UNIT * 244  # sic: 244 in official code, of images of 224
    strength, sigma, shift = strength * unit, sigma * unit, shift * unit
    x = _affine(x, rng, shift)

    def waves():
        noise = rng.uniform(-1, 1, (height, width))
        return scipy.ndimage.gaussian_filter(noise, sigma, mode="reflect", truncate=3) * strength

    right, down = waves(), waves()
    rows, columns = np.mgrid[:height, :width]
    place = rows + down, columns + right
    return np.stack(
        [scipy.ndimage.map_coordinates(x[..., c], place, order=1, mode="reflect") for c in range(x.shape[2])], axis=-1
    )


def _affine(x, rng, shift: float) -> np.ndarray:
    """Moves three corners of a square in the middle by up to `shift` in each direction, and the image with them."""
    height, width = x.shape[:2]
    centre, reach = np.array([height // 2, width // 2]), min(height, width) // 3
    before = np.stack([centre + reach, [centre[0] + reach, centre[1] - reach], centre - reach]).astype(np.float64)
    after = before + rng.uniform(-shift, shift, before.shape)
    # Points are (x, y). Where a pixel of the result comes from: the map from the moved corners back.
    matrix = np.linalg.solve(np.hstack([after, np.ones((3, 1))]), before)  # [3, 2]
    rows, columns = np.mgrid[:height, :width]
    source = np.stack([columns, rows, np.ones_like(rows)], -1) @ matrix
    place = source[..., 1], source[..., 0]
    return np.stack(
        [scipy.ndimage.map_coordinates(x[..., c], place, order=1, mode="mirror") for c in range(x.shape[2])], axis=-1
    )


def pixelate(x, rng, kept):
    height, width = x.shape[:2]
    small = _as_image(x).resize((int(width * kept), int(height * kept)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255


def jpeg_compression(x, rng, quality):
    _as_image(x).save(file := io.BytesIO(), "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255


def _gaussian(x, sigma: float) -> np.ndarray:
    return scipy.ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _as_image(x) -> Image.Image:
    return Image.fromarray(np.rint(x * 255).astype(np.uint8))


# In the paper's order: the function, and its parameters at each severity.
CORRUPTIONS: dict[str, tuple[Callable, tuple[tuple, ...]]] = {
    "gaussian_noise": (gaussian_noise, ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,))),
    "shot_noise": (shot_noise, ((60,), (25,), (12,), (5,), (3,))),
    "impulse_noise": (impulse_noise, ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,))),
    "defocus_blur": (defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "snow": (
        snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": (fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (brightness, ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,))),
    "contrast": (contrast, ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,))),
    "elastic_transform": (
        elastic_transform,
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    ),
    "pixelate": (pixelate, ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,))),
    "jpeg_compression": (jpeg_compression, ((25,), (18,), (15,), (10,), (7,))),
}

# AlexNet's error rates, means over severities, by which errors are divided; from the same repository.
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


def corrupt(
    image: np.ndarray, name: str, severity: int, seed: int = 0, index: int = 0, pictures: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """An image, uint8 `[H, W, 3]`, corrupted: the same whenever seed, name, severity and `index` are.

    Args:
      name: one of `CORRUPTIONS`.
      severity: 1 to 5.
      index: of the image in its data set.
      pictures: frost's.

    Raises:
      ValueError: another name or severity; frost without pictures, or with one that is not larger than the image.
    """
    if name not in CORRUPTIONS or severity not in SEVERITIES:
        raise ValueError(
            f"corruption {name!r} at severity {severity}: expected 1 to 5 of one of {', '.join(CORRUPTIONS)}"
        )
    function, parameters = CORRUPTIONS[name]
    if function is frost:
        small = [picture.shape for picture in pictures if min(np.subtract(picture.shape, image.shape)[:2]) < 1]
        if small or not pictures:
            raise ValueError(f"frost: expected pictures larger than {image.shape[:2]}, got {small or 'none'}")
        function = functools.partial(frost, pictures=pictures)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), severity, index])
    corrupted = function(image / 255, rng, *parameters[severity - 1])
    return (np.clip(corrupted, 0, 1) * 255).astype(np.uint8)


def corruption_errors(errors: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """CE of each corruption in percent: its error rates, one a severity, summed, in those of AlexNet."""
    return {name: 100 * float(np.mean(rates)) / ALEXNET[name] for name, rates in errors.items()}


def mce(errors: Mapping[str, Sequence[float]]) -> float | None:
    """Mean of `corruption_errors` in percent; None unless all 15 are there."""
    return float(np.mean(list(corruption_errors(errors).values()))) if set(errors) == set(ALEXNET) else None
