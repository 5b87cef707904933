"""What every class of torchmetrics does: its options, plot, scripting, copies, collections, and dtypes."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from matplotlib import pyplot as plt
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from normzoo.metrics import ChannelMoments, LogHistogram, NoiseScale

MAKE: dict[str, Any] = {
    "moments": lambda **options: ChannelMoments(3, **options),
    "histogram": lambda **options: LogHistogram(**options),
    "noise": lambda **options: NoiseScale(1, 2, **options),
    "moving noise": lambda **options: NoiseScale(1, 2, 0.5, **options),
}
every_metric = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def given(metric: Metric, seed: int) -> tuple[Tensor, ...]:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)) + 2
    return (x.square().mean(), x.square().mean() / 1.5) if isinstance(metric, NoiseScale) else (x,)


def filled(metric: Any, *seeds: int) -> Any:
    for seed in seeds or (0,):
        metric.update(*given(metric, seed))
    return metric


def values(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def same(result: Any, other: Any) -> bool:
    pairs = zip(values(result), values(other), strict=True)
    return all(torch.allclose(a.double(), b.double(), rtol=1e-12, atol=0) for a, b in pairs)


@pytest.fixture(autouse=True)
def no_figures() -> Iterator[None]:
    yield
    plt.close("all")


def two_ranks(**options: Any) -> dict[str, Any]:
    """Options by which a metric takes itself for one of two ranks with equal states."""
    return {"distributed_available_fn": lambda: True, "dist_sync_fn": lambda x, group=None: [x, x], **options}


# Options


@every_metric
def test_options_are_torchmetrics_own(make: Any) -> None:
    metric = make(sync_on_compute=False, process_group="group", dist_sync_on_step=True, compute_with_cache=False)
    assert (metric.sync_on_compute, metric.process_group) == (False, "group")
    assert (metric.dist_sync_on_step, metric.compute_with_cache) == (True, False)
    assert make(compute_on_cpu=True).compute_on_cpu
    with pytest.raises(ValueError, match="Unexpected keyword arguments: `sync_on_comput`"):
        make(sync_on_comput=True)
    with pytest.raises(ValueError, match="Expected keyword argument `sync_on_compute` to be a `bool` but got 3"):
        make(sync_on_compute=3)


@pytest.mark.parametrize("name", ["moments", "histogram", "noise"])
def test_ranks_are_merged_on_compute_unless_it_is_switched_off(name: str) -> None:
    alone, twice = filled(MAKE[name]()), filled(MAKE[name](), 0, 0)
    merged, apart = filled(MAKE[name](**two_ranks())), filled(MAKE[name](**two_ranks(sync_on_compute=False)))
    assert same(merged.compute(), twice.compute())
    assert same(apart.compute(), alone.compute())
    if name != "noise":  # of which a mean over two equal ranks is the same
        state = "counts" if name == "histogram" else "count"
        with merged.sync_context(dist_sync_fn=merged.dist_sync_fn):
            assert torch.equal(getattr(merged, state), 2 * getattr(alone, state))
    stepwise = MAKE[name](**two_ranks(dist_sync_on_step=True))
    assert same(stepwise(*given(stepwise, 0)), twice.compute())
    assert same(apart(*given(apart, 1)), filled(MAKE[name](), 1).compute())


@every_metric
def test_a_result_is_kept_unless_it_is_not_to_be(make: Any) -> None:
    kept, anew = filled(make()), filled(make(compute_with_cache=False))
    assert kept.compute() is kept.compute()
    anew.compute()
    assert anew._computed is None


# What torchmetrics' own tests ask of every class


@every_metric
def test_forward_gives_the_batch_and_accumulates(make: Any) -> None:
    metric = make()
    for seed in range(3):
        assert same(metric(*given(metric, seed)), filled(make(), seed).compute())
    assert same(metric.compute(), filled(make(), 0, 1, 2).compute())
    metric.reset()
    assert same(filled(metric, 5).compute(), filled(make(), 5).compute())


@every_metric
def test_it_is_scripted(make: Any) -> None:
    torch.jit.script(make())


@every_metric
def test_copies_go_on_by_themselves(make: Any) -> None:
    metric = filled(make())
    for again in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert same(filled(again, 1).compute(), filled(make(), 0, 1).compute())
    assert same(metric.compute(), filled(make()).compute())
    assert hash(metric) != hash(filled(make(), 1))


@every_metric
def test_states_are_saved_if_asked(make: Any) -> None:
    metric = filled(make())
    assert metric.state_dict() == {}
    metric.persistent(True)
    again = make()
    again.persistent(True)
    again.load_state_dict(metric.state_dict())
    assert all(torch.equal(metric.metric_state[name], again.metric_state[name]) for name in metric.metric_state)


@every_metric
def test_what_it_says_of_itself_cannot_be_changed(make: Any) -> None:
    metric = make()
    assert (metric.is_differentiable, metric.higher_is_better) == (False, None)
    for name in ("is_differentiable", "higher_is_better"):
        with pytest.raises(RuntimeError, match=f"Can't change const `{name}`"):
            setattr(metric, name, True)


@every_metric
def test_composed_and_collected(make: Any) -> None:
    metric = filled(make())
    if isinstance(metric.compute(), Tensor):
        assert torch.equal((metric * 2).compute(), 2 * metric.compute())
    collection = MetricCollection({"one": make(), "two": make()}, prefix="of_")
    collection.update(*given(metric, 0))
    assert same(collection["one"].compute(), metric.compute())
    assert same(collection.clone(prefix="more_")["two"].compute(), metric.compute())


@every_metric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_set_dtype_leaves_results_right(make: Any, dtype: torch.dtype) -> None:
    metric = make().set_dtype(dtype)
    for result, exact in zip(values(filled(metric).compute()), values(filled(make()).compute()), strict=True):
        torch.testing.assert_close(result.double(), exact.double(), rtol=1e-5, atol=1e-5)
    assert make().half().float().double().metric_state.keys() == metric.metric_state.keys()
    assert all(state.dtype in (torch.float64, torch.int64) for state in make().half().metric_state.values())


def test_counts_are_whole_whatever_the_dtype() -> None:
    histogram = LogHistogram().set_dtype(torch.float16)
    histogram.counts += 2**40
    histogram.update(torch.tensor([1.0]))
    assert histogram.counts.dtype == torch.int64
    assert int(histogram.counts[0, 1016]) == 2**40 + 1


@every_metric
def test_a_result_stays_when_the_metric_goes_on(make: Any) -> None:
    metric = filled(make())
    result = metric.compute()
    before = copy.deepcopy(result)
    filled(metric, 1)
    assert same(result, before)
    metric.reset()
    assert same(result, before)


MERGED = {name: make for name, make in MAKE.items() if name != "moving noise"}


@pytest.mark.parametrize("make", MERGED.values(), ids=MERGED)
@pytest.mark.parametrize("of", [lambda metric: metric, lambda metric: metric.metric_state], ids=["metric", "state"])
def test_merged_states_are_those_of_all_updates(make: Any, of: Any) -> None:
    metric, other = filled(make(sync_on_compute=False)), filled(make(), 1, 2)
    metric.compute()  # which is not to be returned again
    metric.merge_state(of(other))
    assert same(metric.compute(), filled(make(), 0, 1, 2).compute())
    assert same(other.compute(), filled(make(), 1, 2).compute())
    assert not metric.sync_on_compute
    fresh = make()
    fresh.merge_state(of(other))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that compute was called before update
        assert same(fresh.compute(), other.compute())
    assert same(fresh(*given(fresh, 3)), filled(make(), 3).compute())
    assert same(fresh.compute(), filled(make(), 1, 2, 3).compute())


@pytest.mark.parametrize(
    ("metric", "other", "text"),
    [
        (ChannelMoments(3), ChannelMoments(4), r"moments of shape \(1, 3, 4\) cannot be merged"),
        (ChannelMoments(3, sites=2), ChannelMoments(3), r"moments of shape \(1, 3, 3\) cannot be merged"),
        (NoiseScale(1, 2), NoiseScale(1, 4), r"of batches of \(1, 4\) samples cannot be merged into one of \(1, 2\)"),
        (NoiseScale(1, 2), LogHistogram(), "to be an instance of NoiseScale"),
        (NoiseScale(1, 2), 3, "to be a dict or an instance of Metric"),
    ],
)
def test_states_of_other_sizes_are_not_merged(metric: Any, other: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        metric.merge_state(other)


# Plots


@every_metric
def test_plot_takes_nothing_one_result_or_several(make: Any) -> None:
    metric = make()
    results = [metric(*given(metric, seed)) for seed in range(3)]
    figure, axes = metric.plot()
    assert figure is not None
    assert axes.figure is figure
    _, own = plt.subplots()
    for val in (metric.compute(), results[0], results):
        nothing, axes = metric.plot(val, ax=own)
        assert nothing is None
        assert axes is own
    figure.canvas.draw()
    own.figure.canvas.draw()


def test_plot_draws_the_channels() -> None:
    moments = ChannelMoments(3, sites=2)
    for site in range(2):
        moments.update(given(moments, site)[0], site=site)
    _, axes = moments.plot()
    assert [line.get_label() for line in axes.lines] == ["site 0", "site 1"]
    for site, line in enumerate(axes.lines):
        assert list(line.get_ydata()) == pytest.approx(moments.mean[site].tolist())
    _, axes = moments.plot([moments.compute()] * 4)
    assert [line.get_ydata().tolist() for line in axes.lines] == [[v] * 4 for v in moments.var().mean(1).tolist()]


def test_plot_draws_the_distribution() -> None:
    histogram = LogHistogram(2)
    histogram.update(torch.tensor([0.0, math.nan, math.inf, 1.0, -1.0, 4.0, 4.0]), layer=1)
    _, axes = histogram.plot()
    [steps] = axes.patches  # the other layer is empty
    found = {edge: share for share, edge in zip(*steps.get_data()[:2], strict=False) if share}
    assert found == {1.0: 0.5, 4.0: 0.5}
    assert steps.get_label() == "layer 1"
    _, axes = LogHistogram.plot(filled(LogHistogram()), [filled(LogHistogram(), seed).compute() for seed in range(3)])
    assert [line.get_label() for line in axes.lines] == ["50.0%", "99.0%", "99.9%"]
    assert axes.lines[0].get_ydata().tolist() == [
        filled(LogHistogram(), seed).quantile(0.5, absolute=True) for seed in range(3)
    ]


def test_plot_draws_the_noise_scale() -> None:
    noise = NoiseScale(1, 2)
    results = [noise(*given(noise, seed)) for seed in range(3)]
    _, axes = noise.plot(results)
    assert axes.lines[0].get_ydata().tolist() == [result.scale.item() for result in results]
    assert axes.get_ylabel() == "noise scale, in samples"
    _, axes = noise.plot()
    assert float(axes.lines[0].get_ydata()[0]) == noise.compute().scale.item()
