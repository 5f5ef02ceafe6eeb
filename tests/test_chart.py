"""vitpyramid.tools.chart."""

import numpy as np
import pytest
from PIL import ImageColor

from vitpyramid.tools import chart


def spots(page, colour) -> np.ndarray:
    """Rows and columns of the pixels of about this colour."""
    apart = np.abs(np.asarray(page).astype(int) - ImageColor.getrgb(colour)).max(-1)
    return np.argwhere(apart < 40)


def test_lines_go_where_the_numbers_are():
    page = chart.lines("t", {"rising": [(0, 0), (1, 1), (2, 4)]}, "x", "y")
    assert page.size == (520, 320)
    found = spots(page, chart.COLOURS[0])
    (left_row, left), (right_row, right) = found[found[:, 1].argmin()], found[found[:, 1].argmax()]
    assert left < 60 and right > 490
    assert left_row > 260 and right_row < 50  # rising
    middle = found[np.abs(found[:, 1] - (left + right) / 2) < 2][:, 0].mean()
    assert middle == pytest.approx(left_row - (left_row - right_row) / 4, abs=8)


def test_the_legend_hides_as_little_as_it_can():
    high = {"a": [(0, 0), (5, 10), (10, 10)], "b": [(0, 2), (5, 8), (10, 8)]}
    for mirrored, colour in ((False, 0), (True, 1)):
        series = {name: [(10 - x if mirrored else x, y) for x, y in found] for name, found in high.items()}
        page = chart.lines("t", series)
        found = spots(page, chart.COLOURS[colour])
        for end in (found[:, 1].min(), found[:, 1].max()):
            assert end < 60 or end > 490  # both ends of the line are seen


def test_points_have_names_and_an_axis_may_be_logarithmic():
    page = chart.lines("t", {"a": [(1, 1)], "b": [(10, 2)], "c": [(100, 3)]}, joined=False, log_x=True)
    columns = [spots(page, colour)[:, 1].min() for colour in chart.COLOURS[:3]]
    assert columns[1] - columns[0] == pytest.approx(columns[2] - columns[1], abs=60)
    with pytest.raises(ValueError, match="log_x=True: expected every x above 0"):
        chart.lines("t", {"a": [(0, 1)]}, log_x=True)
    assert chart.lines("nothing", {}).size == chart.lines("one", {"a": [(1, 1), (2, float("nan"))]}).size


def test_ticks_are_round_and_enclose():
    assert chart.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert chart.ticks(0.31, 97) == [0, 20, 40, 60, 80, 100]
    assert chart.ticks(1, 3, least=1.0) == [1, 2, 3]
    assert chart.ticks(2, 2)[0] < 2 < chart.ticks(2, 2)[-1]


def test_heat_is_monotone_and_cells_stay_sharp():
    colours = chart.heat(np.linspace(0, 1, 64)[None]).astype(float) @ [0.299, 0.587, 0.114]
    assert (np.diff(colours[0]) > -1e-9).all()
    assert (chart.heat(np.zeros((2, 2))) == chart.heat(np.zeros((2, 2)))[0, 0]).all()
    page = chart.overlay(np.zeros((64, 64, 3), np.uint8), np.array([[0.0, 1.0], [1.0, 0.0]]))
    assert (page[:32, :32] == page[0, 0]).all() and (page[:32, 32:] == page[0, 63]).all()
    assert page[0, 63].sum() > page[0, 0].sum()
