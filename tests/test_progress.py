"""vitpyramid.progress: lines about work that takes long."""

import logging
import time

import pytest

from vitpyramid import progress


def test_progress_is_told_every_ten_seconds(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert list(progress.with_progress("abcdefghi", 9, "counting")) == list("abcdefghi")
    assert [record.getMessage() for record in caplog.records] == [  # none at the end
        "counting: 3 of 9, ETA 24 s",
        "counting: 6 of 9, ETA 12 s",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599.7, "1 h 00 min"), (18150, "5 h 02 min")],
)
def test_durations(seconds, text):
    assert progress.format_seconds(seconds) == text
