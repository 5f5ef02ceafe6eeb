"""Pictures of numbers: line charts, and maps of heat over an image. Drawn with Pillow, so that no tool needs a plotter.

A notebook shows what these functions return as it is.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#1f6fb4", "#d1495b", "#2e933c", "#e39a2d", "#7b4fa3", "#1aa6a6", "#8c564b", "#5b5b5b", "#c05fa8", "#9aa21f")
# Viridis at equal steps: dark is little, and it is read in grey as well.
_HEAT = np.array(
    [
        *((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141)),
        *((39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37)),
    ],
    np.float64,
)
_FINE = 2  # drawn so many times larger, then reduced: Pillow's lines have no smooth edges


def lines(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str = "",
    y_label: str = "",
    joined: bool = True,
    log_x: bool = False,
    size: tuple[int, int] = (520, 320),
) -> Image.Image:
    """A chart of series of points `(x, y)`, by name; points that are not finite are left out.

    Args:
      joined: by lines; else points, each series' name beside its last one.
      log_x: the first axis is logarithmic; all x are above 0.
      size: width and height in pixels.

    Raises:
      ValueError: `log_x` with an x that is not positive.
    """
    series = {name: [point for point in found if all(map(math.isfinite, point))] for name, found in series.items()}
    if log_x and any(x <= 0 for found in series.values() for x, _ in found):
        raise ValueError("log_x=True: expected every x above 0")
    width, height = (side * _FINE for side in size)
    page = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11 * _FINE)
    left, right, top, bottom = 52 * _FINE, width - 14 * _FINE, 30 * _FINE, height - 42 * _FINE
    scale = math.log10 if log_x else float
    xs = [scale(x) for found in series.values() for x, _ in found] or [0.0, 1.0]
    ys = [y for found in series.values() for _, y in found] or [0.0, 1.0]
    x_ticks, y_ticks = (
        ticks(min(values), max(values), least=float(all(value == int(value) for value in values)))
        for values in (xs, ys)
    )
    x_low, x_high = min(x_ticks[0], *xs), max(x_ticks[-1], *xs)
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return left + across * (right - left), bottom - up * (bottom - top)

    for tick in y_ticks:
        _, y = place(x_low, tick)
        draw.line((left, y, right, y), "#dddddd", _FINE)
        draw.text((left - 6 * _FINE, y), f"{tick:g}", "black", font, anchor="rm")
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        draw.line((x, bottom, x, bottom + 4 * _FINE), "#888888", _FINE)
        draw.text((x, bottom + 7 * _FINE), f"{10**tick:.3g}" if log_x else f"{tick:g}", "black", font, anchor="mt")
    draw.line((left, top, left, bottom, right, bottom), "#888888", _FINE)
    draw.text((left, 8 * _FINE), title, "black", font)
    draw.text(((left + right) / 2, height - 6 * _FINE), x_label, "black", font, anchor="mb")
    draw.text((right, 8 * _FINE), y_label, "black", font, anchor="ra")
    for i, (name, found) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        spots = [place(scale(x), y) for x, y in found]
        if joined and len(spots) > 1:
            draw.line(spots, colour, 2 * _FINE, joint="curve")
        for x, y in spots if len(spots) <= 40 or not joined else []:
            draw.ellipse((x - 3 * _FINE, y - 3 * _FINE, x + 3 * _FINE, y + 3 * _FINE), colour)
        if not joined and spots:
            x, y = spots[-1]
            fits = x + draw.textlength(name, font) + 6 * _FINE < width
            draw.text((x + (6 if fits else -6) * _FINE, y), name, colour, font, anchor="lm" if fits else "rm")
    if joined and len(series) > 1:
        spots = [place(scale(x), y) for found in series.values() for x, y in found]
        _legend(draw, font, list(series), spots, (left, top, right, bottom))
    return page.resize(size, Image.Resampling.LANCZOS)


def _legend(draw, font, names: list[str], spots: list[tuple[float, float]], frame: tuple[float, ...]) -> None:
    """In the corner of the frame (left, top, right, bottom) that has the fewest points."""
    line, margin = 14 * _FINE, 4 * _FINE
    width = max(draw.textlength(name, font) for name in names) + 30 * _FINE
    height = line * len(names) + 6 * _FINE

    def hidden(corner: tuple[float, float]) -> int:
        return sum(0 <= x - corner[0] <= width and 0 <= y - corner[1] <= height for x, y in spots)

    rows, columns = (frame[1] + margin, frame[3] - margin - height), (frame[2] - margin - width, frame[0] + margin)
    left, top = min(((x, y) for y in rows for x in columns), key=hidden)
    draw.rectangle((left, top, left + width, top + height), "white", "#cccccc")
    for i, name in enumerate(names):
        y = top + line * (i + 0.5) + 3 * _FINE
        draw.line((left + 5 * _FINE, y, left + 20 * _FINE, y), COLOURS[i % len(COLOURS)], 2 * _FINE)
        draw.text((left + 25 * _FINE, y), name, "black", font, anchor="lm")


def beside(pages: Sequence[Image.Image]) -> Image.Image:
    """Pages next to one another."""
    whole = Image.new("RGB", (sum(page.width for page in pages), max(page.height for page in pages)), "white")
    left = 0
    for page in pages:
        whole.paste(page, (left, 0))
        left += page.width
    return whole


def ticks(low: float, high: float, count: int = 5, least: float = 0.0) -> list[float]:
    """About `count` round numbers, 1, 2 or 5 times a power of 10 apart, of which the outer two enclose low and high.

    `least`: between two of them; 1 for values that are whole numbers.
    """
    if high <= low:
        low, high = low - 0.5, high + 0.5
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * count >= (high - low) * 0.999)
    step = max(step, least)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def heat(values: np.ndarray) -> np.ndarray:
    """Colours, uint8 `[h, w, 3]`, of a map `[h, w]`, from its least to its largest value."""
    values = np.asarray(values, np.float64)
    place = (values - values.min()) / max(np.ptp(values), 1e-30) * (len(_HEAT) - 1)
    below = np.minimum(place.astype(int), len(_HEAT) - 2)
    share = (place - below)[..., None]
    return np.rint(_HEAT[below] * (1 - share) + _HEAT[below + 1] * share).astype(np.uint8)


def overlay(image: np.ndarray, values: np.ndarray, strength: float = 0.6) -> np.ndarray:
    """An image, uint8 `[H, W, 3]`, in grey under the colours of a map `[h, w]`, whose cells keep sharp edges."""
    height, width = image.shape[:2]
    colours = Image.fromarray(heat(values)).resize((width, height), Image.Resampling.NEAREST)
    grey = Image.fromarray(image).convert("L").convert("RGB")
    return np.asarray(Image.blend(grey, colours, strength))


def history(records: Sequence[Mapping[str, float]]) -> Image.Image:
    """Loss and top-1 of a run by step, from the records that `vitpyramid.train` gives to a callback and returns."""

    def curve(key: str) -> list[tuple[float, float]]:
        return [(record["step"], record[key]) for record in records if key in record]

    charts = []
    for title, key, factor in (("loss", "loss", 1), ("top-1, %", "top1", 100)):
        series = {"training": curve(f"train/{key}"), "evaluation": curve(f"eval/{key}")}
        scaled = {name: [(x, factor * y) for x, y in found] for name, found in series.items()}
        charts.append(lines(title, scaled, "step"))
    return beside(charts)
