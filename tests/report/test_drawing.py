"""Figures of records of any measurement, drawn from what the record says of them."""

from __future__ import annotations

import warnings
from io import BytesIO

import pandas as pd
import pytest

from normzoo.records.schema import Figure
from normzoo.report.drawing import draw_figure

NORMS = Figure("Norms of weights", "line", x="step", y="norm", lines=("layer",), y_scale="log")


@pytest.mark.parametrize("layers", [12, 13, 60])
def test_a_figure_has_room_for_the_lines_of_many_layers(layers: int) -> None:
    frame = pd.DataFrame(
        {"step": step, "layer": f"block.{i}", "norm": i + 1.0} for step in (0, 1) for i in range(layers)
    )
    figure = draw_figure(NORMS, {"run": frame})
    assert figure is not None
    [axes] = figure.axes
    assert len(axes.lines) == layers
    assert len({line.get_color() for line in axes.lines}) == (1 if layers == 12 else layers)
    [legend] = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    shown = range(layers) if layers == 12 else (0, layers // 2, layers - 1)
    assert names == [f"run, block.{i}" for i in shown]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that there is no room for the axes
        figure.savefig(BytesIO(), format="svg")
