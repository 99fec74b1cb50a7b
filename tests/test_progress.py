"""Progress of long computations."""

import re

import pytest

from mtrl import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_half_minute_says_what_is_left(clock):
    """One item takes 12 s: lines come after 36 s, 72 s and 108 s, when 3, 6 and 9 are done."""
    said: list[str] = []

    def items():
        for number in range(10):
            clock[0] += 12
            yield number

    assert list(progress.lines(items(), 10, "episodes", said.append)) == list(range(10))
    assert said == [
        "3/10 episodes  0:01:24 left",
        "6/10 episodes  0:00:48 left",
        "9/10 episodes  0:00:12 left",
    ]


@pytest.mark.parametrize("wanted", [False, True])
def test_output_that_is_no_terminal_gets_lines(wanted, clock, capsys):
    def items():
        clock[0] += 31
        yield "a"
        yield "b"

    assert list(progress.shown(items(), 2, "videos", wanted)) == ["a", "b"]
    said = capsys.readouterr()
    assert said.out == "" and said.err == "1/2 videos  0:00:31 left\n" * wanted


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress.shown(iter("abc"), 3, "videos", True)) == list("abc")
    assert re.search(r"3/3 .* videos", capsys.readouterr().err)
