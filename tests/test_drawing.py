"""The look of figures: colours, labels beside lines, plain log axes, dark paper."""

import matplotlib
import numpy as np
import pytest

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb

from jaxnorm import Groups, drawing, methods
from jaxnorm.drawing._style import apart


@pytest.fixture(autouse=True)
def no_figure_is_left():
    with matplotlib.rc_context():
        yield
        plt.close("all")


def contrast(one, other):
    """Of two colours, from 1 to 21, as WCAG 2 defines it."""

    def luminance(colour):
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read(dark):
    drawing.style(dark=dark)
    paper = plt.rcParams["figure.facecolor"]
    for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color"):
        assert contrast(plt.rcParams[name], paper) > 7


def test_dark_colours_are_brighter_and_stillapart():
    drawing.style(dark=True)
    paper = plt.rcParams["figure.facecolor"]
    colours = [drawing.colour_of(name) for name in drawing.COLOURS]
    assert min(contrast(colour, paper) for colour in colours) > 4.5
    assert len(set(colours)) == len(colours)


def test_an_unknown_name_has_no_colour():
    with pytest.raises(ValueError, match="no colour for 'bathc'.*batch group"):
        drawing.colour_of("bathc")


@pytest.mark.parametrize(
    "places, expected",
    [
        ([0, 100, 50], [0, 100, 50]),  # far enough
        ([10, 10], [5, 15]),
        ([30, 12, 10], [30, 16, 6]),
        ([0, 1, 2], [-9, 1, 11]),
        ([], []),
    ],
)
def test_labels_moveapart_by_as_little_as_may_be(places, expected):
    assert apart(places, 10) == pytest.approx(expected)


def test_lines_are_labelled_at_their_ends_in_their_colours():
    drawing.style()
    _, ax = plt.subplots()
    for name, end in (("batch", 1.0), ("group", 1.001)):
        ax.plot([0, 1, 2], [0, end, np.nan], color=drawing.colour_of(name), label=name)
    ax.plot([0, 1], [0, 0])
    drawing.label_lines(ax)
    batch, group = ax.texts
    assert (batch.get_text(), group.get_text()) == ("batch", "group")
    assert batch.xy[0] == 1 and batch.get_color() == drawing.COLOURS["batch"]
    boxes = [text.get_window_extent() for text in (batch, group)]
    assert not boxes[0].overlaps(boxes[1]) and boxes[0].y1 < boxes[1].y0


def test_log_axes_have_plain_numbers_at_their_true_places():
    fig, ax = plt.subplots()
    ax.plot([2, 32], [0.00001, 100])
    drawing.plain_log(ax.xaxis, (2, 8, 32))
    drawing.plain_log(ax.yaxis, (0.00001, 1, 100), unit=" %")
    fig.canvas.draw()
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["2", "8", "32"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.00001 %", "1 %", "100 %"]
    assert ax.get_xticks().tolist() == [2, 8, 32] and not len(ax.get_xticks(minor=True))


def texts(row):
    _, ax = plt.subplots()
    drawing.draw_row(ax, row, (4, 2, 2, 6))
    return [text.get_text() for text in ax.texts]


def test_a_mean_that_is_fixed_is_marked():
    assert "mean" in texts(methods.rms_norm())
    for row in (methods.token_layer_norm(), Groups(batch=1)):
        assert "mean" not in texts(row)


def test_svg_files_keep_text_and_are_the_same_each_time(tmp_path):
    for dark in (False, True):
        drawing.style(dark=dark)
        files = []
        for name in "ab":
            fig, ax = plt.subplots()
            drawing.draw_row(ax, methods.group_norm(3), (4, 2, 2, 6), title="group norm")
            fig.savefig(tmp_path / f"{name}.svg", metadata={"Date": None})
            files.append((tmp_path / f"{name}.svg").read_text())
        assert files[0] == files[1] and ">group norm</text>" in files[0]
        assert ("#0d1117" in files[0].lower()) == dark
