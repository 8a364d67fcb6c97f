"""What is shown of a computation: lines in a log, a bar on a terminal."""

import io
import sys

import pytest
import torch
from torch import nn

from genfast.training import progress
from genfast.training.progress import counting, describe, digits


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(calls, total=4, fail=None):
    layer = nn.Linear(2, 2)
    with counting(layer, total, "four calls"):
        for _ in range(calls):
            layer(torch.zeros(1, 2))
        if fail is not None:
            raise fail
    return layer


def test_one_line_where_it_takes_no_time(capsys):
    run(4)
    assert capsys.readouterr().out == "four calls\n"


def test_lines_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    run(3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" in ")[0] for line in lines] == ["four calls", "1 / 4", "2 / 4", "3 / 4"]


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    run(4)
    shown = terminal.getvalue()
    assert "four calls" in shown
    assert "4 / 4" in shown
    assert "\nfour calls\n" not in shown


def test_nothing_is_counted_afterwards(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    layer = run(1)
    capsys.readouterr()
    layer(torch.zeros(1, 2))
    assert capsys.readouterr().out == ""
    assert not layer._forward_hooks


def test_an_error_leaves_the_terminal_as_it_was(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(ValueError, match="broken"):
        run(1, fail=ValueError("broken"))
    # The cursor, hidden by the bar, is shown again.
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")


def test_small_losses_have_more_digits():
    row = {"epoch": 1, "loss": 0.03127, "test_loss": 0.5, "images_per_second": 10.0}
    assert describe(row, 2) == "epoch 1/2  loss 0.0313  test loss 0.5000  10 images/s"
    assert [digits(value) for value in (-0.5, 1.0, -105.355)] == ["-0.5000", "1.00", "-105.36"]
    assert digits(3.14159, 3) == "3.142"
