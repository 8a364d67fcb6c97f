"""Pictures that set models beside each other: every image where it belongs, every heading whole."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from genfast.experiments.figures import Panel, _plot, save_panels, save_plots
from genfast.metrics import Estimate


def test_panels_stand_in_order_below_their_headings(tmp_path):
    greys = torch.arange(4).view(4, 1, 1, 1).mul(60).to(torch.uint8)
    panels = {name: greys[index].expand(6, 1, 28, 28) for index, name in enumerate("abcd")}
    save_panels(panels, tmp_path / "four.png", columns=3, across=2)
    picture = np.asarray(Image.open(tmp_path / "four.png"))
    # Two rows of three images with a line between, twice each way.
    width, height = 3 * 29 - 1, 2 * 29 - 1
    for index in range(4):
        left, top = 10 + index % 2 * (width + 10), 20 + index // 2 * (height + 30)
        tile = picture[top : top + height, left : left + width]
        assert set(np.unique(tile)) <= {60 * index, 128}
        assert (tile[:28, :28] == 60 * index).all()
        assert (picture[top - 20 : top, left : left + 12] < 255).any()


def test_a_long_heading_is_whole(tmp_path):
    image = torch.zeros(1, 1, 28, 28)
    for count in (1, 40):
        save_panels({"m" * count: image, "n": image}, tmp_path / f"{count}.png", columns=1)
    short, long = (Image.open(tmp_path / f"{count}.png").width for count in (1, 40))
    assert long - short > 2 * 40 * 5


def test_small_images_are_enlarged_and_colours_stay(tmp_path):
    image = torch.zeros(1, 3, 8, 8)
    image[:, 0] = 1.0
    save_panels({"red": image}, tmp_path / "red.png")
    picture = np.asarray(Image.open(tmp_path / "red.png"))
    assert (picture[20 : 20 + 24, 10 : 10 + 24] == [255, 0, 0]).all()
    with pytest.raises(ValueError, match="panels: expected at least one, got none"):
        save_panels({}, tmp_path / "none.png")


def plotted(**options):
    axes = Figure().subplots()
    points = [(1, Estimate(2.0, 1.0, 3.0)), (10, Estimate(3.0, 2.5, 3.5))]
    _plot(axes, Panel("title", "x", "y", options.pop("lines", {"a": points}), **options))
    return axes


def test_plots_show_points_and_their_intervals():
    axes = plotted()
    assert axes.lines[0].get_xydata().tolist() == [[1, 2], [10, 3]]
    (band,) = axes.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert {(1, 1), (1, 3), (10, 2.5), (10, 3.5)} <= corners
    assert not plotted(lines={"a": [(1, 2.0), (10, 3.0)]}).collections
    assert len(plotted(lines={"a": [(1, 2.0)], "none": []}).lines) == 1


def test_plots_have_what_their_panel_asks_for():
    assert plotted(log_x=True, log_y=True).get_xscale() == "log"
    assert plotted(y_limits=(0.0, 9.0)).get_ylim() == (0.0, 9.0)
    assert [text.get_text() for text in plotted(ticks=("one", "two")).get_xticklabels()] == ["one", "two"]
    assert [text.get_text() for text in plotted(names={"a": ["one", "two"]}).texts] == ["one", "two"]
    axes = plotted(levels={"here": 2.5})
    assert axes.lines[1].get_ydata()[0] == 2.5
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "here"]
    assert plotted().get_legend() is None


def test_plots_are_set_in_rows(tmp_path):
    save_plots([Panel("title", "x", "y", {"a": [(1, 2.0), (10, 3.0)]})] * 3, tmp_path / "three.png", across=2)
    assert Image.open(tmp_path / "three.png").size == (880, 700)
