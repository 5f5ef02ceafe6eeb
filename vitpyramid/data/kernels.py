"""Pillow's resizing and sliding of images, compiled by numba: the same bits in a fraction of the time.

Pillow's loops use no vector instructions. These follow its C code (`libImaging/Resample.c`, `libImaging/Geometry.c`)
number by number: fixed-point weights of 22 bits and whole bytes between the two passes in `resize`; double precision,
then truncation, in `slide`. So numba changes the speed and nothing else. That holds where Pillow was compiled without
fused multiply-add, as for x86-64; elsewhere a pixel of `slide` may differ by one level.

Images are uint8 [H, W, 3]. Compiled code is kept on disk and runs without Python's lock.
"""

import math

import numba
import numpy as np
from numba import types

_BITS = 22
_HALF = np.int32(1 << (_BITS - 1))
_TILE = 16  # rows transposed together, so that they stay in the first cache
_index = np.uintp  # each access by a signed index first asks whether it is negative: twice the time

_IMAGE = types.Array(types.uint8, 3, "A", readonly=True)  # also crops of larger images and read-only ones
_NEW_IMAGE = types.uint8[:, :, ::1]
_ROWS = types.uint8[:, ::1]
_WEIGHTS = types.Tuple((types.int32[::1], types.int32[::1], types.int32[:, ::1]))


def _compiled(*signature):
    def decorate(function):
        try:
            return numba.njit(signature, nogil=True, cache=True)(function)
        except RuntimeError:  # numba found no folder that it may write to
            return numba.njit(signature, nogil=True)(function)

    return decorate


@_compiled(types.float64, types.boolean)
def _filter(x, cubic):
    x = abs(x)
    if not cubic:
        return max(1.0 - x, 0.0)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 if x < 2.0 else 0.0


@_compiled(types.int64, types.int64, types.boolean)
def _weights(size, new_size, cubic):
    """First old pixel of each new one, the number of old pixels, and their weights [new_size, taps]."""
    step = size / new_size
    stretch = max(step, 1.0)  # the filter widens where the image shrinks: antialiasing
    support = (2.0 if cubic else 1.0) * stretch
    taps = math.ceil(support) * 2 + 1
    first, count = np.empty(new_size, np.int32), np.empty(new_size, np.int32)
    weights, exact = np.zeros((new_size, taps), np.int32), np.empty(taps)
    for new in range(new_size):
        centre = (new + 0.5) * step
        low, high = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), size)
        first[new], count[new] = low, high - low
        total = 0.0
        for i in range(high - low):
            exact[i] = _filter((i + low - centre + 0.5) * (1.0 / stretch), cubic)
            total += exact[i]
        for i in range(high - low):
            weight = exact[i] / total * (1 << _BITS)
            weights[new, i] = int(weight - 0.5 if weight < 0 else weight + 0.5)
    return first, count, weights


@_compiled(_IMAGE, _NEW_IMAGE)
def _transpose(image, out):
    height, width = _index(image.shape[0]), _index(image.shape[1])
    red, green, blue = _index(0), _index(1), _index(2)
    for top in range(_index(0), height, _index(_TILE)):
        for x in range(width):
            line = out[x]
            for y in range(top, min(top + _index(_TILE), height)):
                line[y, red] = image[y, x, red]
                line[y, green] = image[y, x, green]
                line[y, blue] = image[y, x, blue]


@_compiled(_ROWS, _WEIGHTS, _ROWS)
def _mix_rows(rows, mix, out):
    """Each row of `out` is a weighted sum of neighbouring ones of `rows`: the loops over j become vector code."""
    first, count, weights = mix
    length = rows.shape[1]
    total = np.empty(length, np.int32)
    for new in range(out.shape[0]):
        total[:] = _HALF
        for k in range(count[new]):
            weight, row = weights[new, k], rows[first[new] + k]
            for j in range(length):
                total[j] += np.int32(weight * np.int32(row[j]))
        line = out[new]
        for j in range(length):
            level = np.int32(total[j] >> _BITS)
            line[j] = np.uint8(0 if level < 0 else 255 if level > 255 else level)


@_compiled(_IMAGE, types.int64, types.boolean, types.int64, types.int64)
def _resize_across(image, width, cubic, left, columns):
    height, old_width = image.shape[:2]
    turned, across = np.empty((old_width, height, 3), np.uint8), np.empty((columns, height, 3), np.uint8)
    _transpose(image, turned)
    first, count, weights = _weights(old_width, width, cubic)
    mix = first[left : left + columns], count[left : left + columns], weights[left : left + columns]
    _mix_rows(turned.reshape(old_width, height * 3), mix, across.reshape(columns, height * 3))
    upright = np.empty((height, columns, 3), np.uint8)
    _transpose(across, upright)
    return upright


@_compiled(_NEW_IMAGE, _WEIGHTS)
def _resize_down(image, mix):
    old_height, width = image.shape[:2]
    out = np.empty((len(mix[0]), width, 3), np.uint8)
    _mix_rows(image.reshape(old_height, width * 3), mix, out.reshape(len(out), width * 3))
    return out


@_compiled(_IMAGE, types.int64, types.int64, types.boolean, types.boolean, types.UniTuple(types.int64, 4))
def resize(image, height, width, cubic, down_first, box):
    """Antialiased bicubic or bilinear resize: Pillow's `resize` of one side, then of the other.

    Of the result only the `box`, (left, upper, right, lower) as Pillow's `crop` has it, is made.
    """
    left, upper, right, lower = box
    first, count, weights = _weights(image.shape[0], height, cubic)
    first, count, weights = first[upper:lower], count[upper:lower], weights[upper:lower]
    top, bottom = first[0], first[-1] + count[-1]
    mix, rows = (first - top, count, weights), image[top:bottom]
    if down_first:
        whole = np.empty(rows.shape, np.uint8)
        whole[:] = rows
        return _resize_across(_resize_down(whole, mix), width, cubic, left, right - left)
    return _resize_down(_resize_across(rows, width, cubic, left, right - left), mix)


@_compiled(types.float64, types.float64, types.float64, types.float64, types.float64, types.boolean)
def _between(a, b, c, d, t, cubic):
    if cubic:
        return b + t * (c - a + t * (2.0 * (a - b) + c - d + t * (b - a - c + d)))
    return b + (c - b) * t


@_compiled(_IMAGE, types.float64, types.float64, types.boolean, types.UniTuple(types.uint8, 3), _NEW_IMAGE)
def _slide_rows(image, slope, offset, cubic, fill, out):
    height, width = image.shape[:2]
    for y in range(_index(height)):
        for x in range(_index(width)):
            place = (x + 0.5 + slope * (y + 0.5)) + offset
            if not 0.0 <= place < width:
                out[y, x, 0], out[y, x, 1], out[y, x, 2] = fill
                continue
            place -= 0.5
            left = math.floor(place)
            part = place - left
            row, a, b = image[y], _index(max(left - 1, 0)), _index(max(left, 0))
            c, d = _index(min(left + 1, width - 1)), _index(min(left + 2, width - 1))
            for band in range(_index(3)):
                level = _between(
                    float(row[a, band]), float(row[b, band]), float(row[c, band]), float(row[d, band]), part, cubic
                )
                out[y, x, band] = 0 if level <= 0.0 else 255 if level >= 255.0 else int(level)
    return out


@_compiled(_IMAGE, types.float64, types.float64, types.boolean, types.boolean, types.UniTuple(types.uint8, 3))
def slide(image, slope, offset, down, cubic, fill):
    """Moves every row by slope * (y + 0.5) + offset pixels to the left, or (`down`) every column likewise upwards.

    Pillow's `transform` by the matrix (1, slope, offset, 0, 1, 0), or (1, 0, 0, slope, 1, offset); what comes from
    outside is `fill`.
    """
    height, width = image.shape[:2]
    out = np.empty((height, width, 3), np.uint8)
    if not down:
        _slide_rows(image, slope, offset, cubic, fill, out)
        return out
    turned, slid = np.empty((width, height, 3), np.uint8), np.empty((width, height, 3), np.uint8)
    _transpose(image, turned)
    _slide_rows(turned, slope, offset, cubic, fill, slid)
    _transpose(slid, out)
    return out


_MIX = (_ROWS, types.float64[::1], types.float64[::1], types.uintp, types.uintp, types.uint8[::1])


@_compiled(*_MIX)
def _mix_linear(taps, across, down, start, stop, levels):
    a, b, c, d = taps[0], taps[1], taps[2], taps[3]
    for k in range(start, stop):
        upper = float(a[k]) + (float(b[k]) - float(a[k])) * across[k]
        lower = float(c[k]) + (float(d[k]) - float(c[k])) * across[k]
        levels[k] = np.uint8(np.int32(upper + (lower - upper) * down[k]))


@_compiled(*_MIX)
def _mix_cubic(taps, across, down, start, stop, levels):
    rows = np.empty((4, len(across)))
    for i in range(4):
        a, b, c, d, row = taps[4 * i], taps[4 * i + 1], taps[4 * i + 2], taps[4 * i + 3], rows[i]
        for k in range(start, stop):
            row[k] = _between(float(a[k]), float(b[k]), float(c[k]), float(d[k]), across[k], True)
    p, q, r, s = rows[0], rows[1], rows[2], rows[3]
    for k in range(start, stop):
        level = _between(p[k], q[k], r[k], s[k], down[k], True)
        levels[k] = np.uint8(np.int32(min(max(level, 0.0), 255.0)))


@_compiled(_IMAGE, types.UniTuple(types.float64, 6), types.boolean, types.UniTuple(types.uint8, 3))
def affine(image, matrix, cubic, fill):
    """Pillow's `transform` by a matrix: the pixel at (x, y) comes from (a x + b y + c, d x + e y + f), or is `fill`.

    Of each row the pixels that are mixed are first copied beside each other, so that the mixing becomes vector code.
    """
    height, width = image.shape[:2]
    a, b, c, d, e, f = matrix
    out = np.empty((height, width, 3), np.uint8)
    reach = 4 if cubic else 2
    taps = np.empty((reach, reach, width, 3), np.uint8)
    flat = taps.reshape(reach * reach, width * 3)
    across, down = np.empty(width * 3), np.empty(width * 3)
    red, green, blue = _index(0), _index(1), _index(2)
    for y in range(_index(height)):
        begin, end = width, 0  # of the pixels that come from inside
        line = out[y]
        for x in range(_index(width)):
            from_x, from_y = a * (x + 0.5) + b * (y + 0.5) + c, d * (x + 0.5) + e * (y + 0.5) + f
            if not (0.0 <= from_x < width and 0.0 <= from_y < height):
                line[x, red], line[x, green], line[x, blue] = fill
                continue
            begin, end = min(begin, x), x + 1
            from_x, from_y = from_x - 0.5, from_y - 0.5
            left, upper = math.floor(from_x), math.floor(from_y)
            for band in range(_index(3)):
                place = _index(3) * x + band
                across[place], down[place] = from_x - left, from_y - upper
            if cubic:
                left, upper = left - 1, upper - 1
            inside = left >= 0 and left + reach <= width
            for i in range(_index(reach)):
                row = image[_index(min(max(upper + int(i), 0), height - 1))]
                for j in range(_index(reach)):
                    column = _index(left) + j if inside else _index(min(max(left + int(j), 0), width - 1))
                    tap = taps[i, j, x]
                    tap[red], tap[green], tap[blue] = row[column, red], row[column, green], row[column, blue]
        start, stop = _index(3 * begin), _index(3 * end)
        if stop > start:
            if cubic:
                _mix_cubic(flat, across, down, start, stop, line.reshape(width * 3))
            else:
                _mix_linear(flat, across, down, start, stop, line.reshape(width * 3))
    return out
