import math
import sys

import pytest

from pyprune import SensitivityResult, SensitivityTarget

RATIOS = (0.1, 0.5, 0.9)


def result(count):
    return SensitivityResult(
        0.9,
        {
            f"layer.{i}.weight": SensitivityTarget(10, 10, {ratio: 0.9 - ratio / (i + 1) for ratio in RATIOS})
            for i in range(count)
        },
    )


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, before they are pixels."""
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: (drawn.append(figure), save(figure, *args, **kw))
    )
    return drawn


@pytest.mark.parametrize(("count", "curves_named"), [(1, 1), (3, 3), (60, 9)])
def test_plot_draws_every_target(tmp_path, figures, count, curves_named):
    result(count).plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    heat, curves, _ = figures[0].axes
    assert [label.get_text() for label in heat.get_yticklabels()] == [f"layer.{i}.weight" for i in range(count)]
    assert heat.images[0].get_array()[0].tolist() == pytest.approx(RATIOS)
    # Each has a curve, and one line is the zero.
    assert len(curves.lines) == count + 1
    legend = [text.get_text() for text in curves.get_legend().get_texts()]
    assert len(legend) == curves_named
    assert legend[0] == "layer.0.weight"  # the most sensitive
    assert legend[-1] == ("52 others" if count == 60 else f"layer.{count - 1}.weight")


def test_plot_copes_with_what_was_not_measured_or_not_finite(tmp_path, figures):
    targets = {
        "stopped": SensitivityTarget(10, 10, {0.1: 0.5}),
        "broken": SensitivityTarget(10, 10, {0.1: 0.9, 0.5: math.nan}),
        "better": SensitivityTarget(10, 10, {0.1: 0.95, 0.5: 0.9}),
    }
    SensitivityResult(0.9, targets).plot(tmp_path / "picture.png")
    heat, curves, _ = figures[0].axes
    shades = heat.images[0].get_array()
    assert shades.filled(-1).tolist() == [pytest.approx([0.4, -1]), pytest.approx([0, 0.4]), [0, 0]]
    by_name = {line.get_label(): line for line in curves.lines}
    assert list(by_name["broken"].get_xdata()) == [0, 0.1]
    assert list(by_name["better"].get_ydata()) == pytest.approx([0, -0.05, 0])


def test_plot_of_nothing_lost_is_drawn(tmp_path):
    SensitivityResult(0.9, {"w": SensitivityTarget(10, 10, {0.5: 0.9})}).plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


def test_plot_says_that_it_takes_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        result(1).plot(tmp_path / "picture.png")
