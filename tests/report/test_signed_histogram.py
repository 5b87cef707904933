"""Histograms of values with their sign: shares in bins of one width, and their panels."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from normzoo.functional.buckets import bucket_counts
from normzoo.records.schema import Figure
from normzoo.report.drawing import draw_figure
from normzoo.report.signed_histogram import BINS, signed_shares

VALUES = Figure("Values", "signed histogram", x="layer", y="histogram", facet="layer", y_scale="log", note="kurtosis")


def pairs(x: np.ndarray, mantissa_bits: int) -> np.ndarray:
    counts = bucket_counts(torch.from_numpy(x), mantissa_bits)
    filled = counts.nonzero().flatten()
    return torch.stack([filled, counts[filled]], 1).numpy()


def shares_by_hand(x: np.ndarray, mantissa_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Value by value: its bucket's ends from math.frexp, spread evenly over the bins."""
    spans = []
    for value in x[np.isfinite(x)].tolist():
        if abs(value) < 2.0**-126:
            spans.append((0.0, 0.0))
            continue
        fraction, exponent = math.frexp(abs(value))  # 0.5 <= fraction < 1
        steps = 2 ** (mantissa_bits + 1)
        low = math.floor(fraction * steps) / steps * 2.0**exponent
        high = low + 2.0**exponent / steps
        spans.append((low, high) if value > 0 else (-high, -low))
    largest = max(max(abs(low), abs(high)) for low, high in spans)
    edges = np.linspace(-largest, largest, BINS + 1)
    counts = np.zeros(BINS)
    for low, high in spans:
        if low == high:
            counts[BINS // 2] += 1
            continue
        for i in range(BINS):
            counts[i] += max(0.0, min(high, edges[i + 1]) - max(low, edges[i])) / (high - low)
    return edges, counts / len(spans)


@pytest.mark.parametrize("mantissa_bits", [0, 1, 3, 7])
def test_shares_are_those_of_a_loop_over_values(mantissa_bits: int) -> None:
    x = np.random.default_rng(0).standard_t(2, 300).astype(np.float32)
    special = [0.0, -0.0, 1e-41, -1e-41, math.inf, -math.inf, math.nan]
    x = np.concatenate([x, np.array(special, dtype=np.float32)])
    edges, shares = signed_shares(pairs(x, mantissa_bits), mantissa_bits)
    expected_edges, expected = shares_by_hand(x, mantissa_bits)
    np.testing.assert_allclose(edges, expected_edges, rtol=1e-12)
    np.testing.assert_allclose(shares, expected, atol=1e-12)
    assert shares.sum() == pytest.approx(1.0)


def test_shares_are_near_those_of_the_values_themselves() -> None:
    """With 7 bits a bucket is narrower than a bin: at each edge no more than a bucket's values are elsewhere."""
    x = np.random.default_rng(1).standard_normal(100_000).astype(np.float32)
    edges, shares = signed_shares(pairs(x, 7), 7)
    exact = np.histogram(x, edges)[0] / len(x)
    np.testing.assert_allclose(shares, exact, atol=2e-3)
    assert not np.allclose(shares, np.histogram(-x - 1, edges)[0] / len(x), atol=2e-3)


def test_counts_of_several_histograms_are_added() -> None:
    one, other = (np.random.default_rng(s).standard_normal(200).astype(np.float32) for s in (0, 1))
    apart = signed_shares(np.concatenate([pairs(one, 3), pairs(other, 3)]), 3)
    together = signed_shares(pairs(np.concatenate([one, other]), 3), 3)
    for a, b in zip(apart, together, strict=True):
        np.testing.assert_allclose(a, b)


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [math.nan, math.inf]])
def test_without_a_value_other_than_zero_there_is_nothing(values: list[float]) -> None:
    histogram = pairs(np.array(values, dtype=np.float32), 3)
    assert [part.size for part in signed_shares(histogram, 3)] == [0, 0]
    frame = pd.DataFrame([{"step": 0, "layer": "a", "kurtosis": None, "mantissa_bits": 3, "histogram": histogram}])
    assert draw_figure(VALUES, {"run": frame}) is None


def frame(scale: float, layers: tuple[str, ...] = ("conv.weight",)) -> pd.DataFrame:
    x = np.random.default_rng(0).standard_normal(500).astype(np.float32) * np.float32(scale)
    row = {"step": 0, "kurtosis": 1.5, "mantissa_bits": 7, "histogram": pairs(x, 7)}
    return pd.DataFrame([{**row, "layer": layer} for layer in layers])


def test_each_run_has_a_panel_with_a_range_of_its_own() -> None:
    figure = draw_figure(VALUES, {"with": frame(0.01), "without": frame(100.0)})
    assert figure is not None
    narrow, wide = (panel.x.domain[1] for panel in figure.panels)
    assert wide / narrow == pytest.approx(1e4, rel=0.01)  # up to the width of a bucket
    assert [len(panel.series) for panel in figure.panels] == [1, 1]
    assert len({panel.series[0].color for panel in figure.panels}) == 2
    assert [mark.label for mark in figure.legend()] == ["with, kurtosis 1.5", "without, kurtosis 1.5"]
    assert not figure.shared_y
    edges, shares = signed_shares(np.concatenate([*frame(0.01)["histogram"]]), 7)
    [series] = figure.panels[0].series
    assert series.x.tolist() == [edge for pair in itertools.pairwise(edges) for edge in pair]
    assert np.nan_to_num(series.y).tolist() == np.repeat(shares, 2).tolist()
    assert series.base is not None
    assert 0 < series.base < shares[shares > 0].min()  # down to which the area is filled, also on a logarithmic axis


def test_of_many_runs_four_are_drawn_and_of_many_layers_the_middle_one() -> None:
    figure = draw_figure(VALUES, {f"{i}": frame(1.0, ("a", "b.weight", "c")) for i in range(7)})
    assert figure is not None
    assert [mark.label[0] for mark in figure.legend()] == ["0", "2", "4", "6"]
    assert all(panel.title.startswith("b.weight") for panel in figure.panels)
    assert figure.columns == 2
    figure = draw_figure(VALUES, {"": frame(1.0, ("a", "b", "c"))})
    assert figure is not None
    assert [panel.title[0] for panel in figure.panels] == ["a", "b", "c"]


def test_seeds_share_a_panel_of_all_their_values() -> None:
    runs = {"0": frame(1.0), "1": frame(3.0), "other": frame(1.0)}
    figure = draw_figure(VALUES, runs, groups={"both (2 seeds)": ["0", "1"]})
    assert figure is not None
    shares = signed_shares(np.concatenate([*runs["0"]["histogram"], *runs["1"]["histogram"]]), 7)[1]
    np.testing.assert_allclose(np.nan_to_num(figure.panels[0].series[0].y[::2]), shares)
    assert len(figure.panels) == 2
