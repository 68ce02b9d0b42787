"""Progress: a bar in a terminal, a line now and then elsewhere; all of it on stderr."""

import io
import re
import sys

import pytest

from scpl_compile.runtime.progress import Progress, say

LOSSES = [{"contrast": 1.0, "cross_entropy": 0.25}, {"classifier": 2.0}]


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_say_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_without_a_terminal_there_is_a_line_for_every_tenth(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress(100, 0) as progress:
        for step in range(1, 101):
            progress.show(step, LOSSES, 50.0)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "step 10/100: 50 samples/s, loss per stage 1.250 2.000"
    assert lines[-1].startswith("step 100/100: ")


def test_a_stage_that_has_finished_no_step_yet_has_a_dash(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress(10, 0) as progress:
        progress.show(5, [LOSSES[0], {}], 50.0)
    assert capsys.readouterr().err == "step 5/10: 50 samples/s, loss per stage 1.250 -\n"


def test_a_resumed_run_counts_from_where_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100, 95) as progress:
        progress.show(96, LOSSES, 50.0)
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("num_stages", [1, 2, 16])
def test_the_bar_stays_in_one_line_of_80_columns(
    num_stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in (("COLUMNS", "80"), ("TERM", "xterm"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    with Progress(1000, 0) as progress:
        progress.show(500, [LOSSES[0]] * num_stages, 1234.0)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\r", terminal.getvalue())
    last = [line for line in shown.splitlines() if line.strip()][-1]
    assert "500/1000" in last and "1234 samples/s, loss per stage 1.250" in last
    assert len(last) <= 80
