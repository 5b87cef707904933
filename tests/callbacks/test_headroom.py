"""Which learning rate is stable: the headroom along the step that is made, against quadratics solved by hand."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from callbacks_small import Ops, SmallNet, loader, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from normzoo import load_run, watch
from normzoo.callbacks import GradientTails, RelativeLoss
from normzoo.callbacks._run.gradients import is_gradient_step
from normzoo.callbacks._run.lightning import LightningRun
from normzoo.functional import bounded_headroom, learning_rate_headroom
from normzoo.records.headroom import headroom_quantile, headroom_text

GRID = [2.0**k for k in range(-6, 4)]
STEPS = 4


def sgd(lr: float) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    while True:
        yield lambda g, theta: lr * g


def momentum(lr: float) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    buffer: list[Tensor] = []

    def step(g: Tensor, theta: Tensor) -> Tensor:
        buffer[:] = [0.9 * buffer[0] + g] if buffer else [g]
        return lr * buffer[0]

    while True:
        yield step


def adam(lr: float, decay: float = 0.0) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    m = v = torch.zeros(2, dtype=torch.float64)
    for t in range(1, STEPS + 1):

        def step(g: Tensor, theta: Tensor, t: int = t) -> Tensor:
            nonlocal m, v
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            rate = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            return lr * (rate + decay * theta)

        yield step


RULES: dict[str, tuple[Callable[[Any, float], torch.optim.Optimizer], Callable[[float], Any], str]] = {
    "sgd": (lambda p, lr: torch.optim.SGD(p, lr), sgd, "gradient"),
    "momentum": (lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), momentum, "update"),
    "adam": (lambda p, lr: torch.optim.Adam(p, lr), adam, "update"),
    "adamw": (lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=0.1), lambda lr: adam(lr, 0.1), "update"),
}


class Quadratic(nn.Module):
    """L = sum(h theta^2) / 2, in float64."""

    def __init__(self, h: list[float], theta: list[float]) -> None:
        super().__init__()
        self.h = torch.tensor(h, dtype=torch.float64)
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self) -> Tensor:
        return (self.h * self.theta.square()).sum() / 2


def records(model: Quadratic, optimizer: torch.optim.Optimizer, **options: Any) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        callback = RelativeLoss(1, loss=lambda module, batch: module(), **options)
        with watch(model, optimizer, callback, dirpath=folder) as watching:
            for _ in range(STEPS):
                optimizer.zero_grad()
                model().backward()
                watching.batch(None)
                optimizer.step()
        return load_run(folder)["relative_loss"].to_dict("records")


def expected(h: Tensor, theta: Tensor, u: Tensor) -> float:
    """The s at which L(theta - s u) is L(theta) again: 2 g.u / u.Hu with g = H theta; 0 for a step that goes up."""
    return max(float(2 * (h * theta * u).sum() / (h * u * u).sum()), 0.0)


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=6, deadline=None)
@given(
    curvature=st.lists(st.floats(-6, 6).map(lambda e: 10**e), min_size=2, max_size=2),
    stable=st.floats(-3, 3),
    theta=st.lists(st.floats(0.1, 2.0) | st.floats(-2.0, -0.1), min_size=2, max_size=2),
)
def test_the_headroom_of_a_quadratic(rule: str, curvature: list[float], stable: float, theta: list[float]) -> None:
    """At learning rates from a thousandth of the largest stable one of gradient descent to a thousand times it."""
    make, by_hand, along = RULES[rule]
    lr = 10**stable * 2 / max(curvature)
    model = Quadratic(curvature, theta)
    now, h = model.theta.detach().clone(), model.h
    rows = iter(records(model, make(model.parameters(), lr)))
    for step, rule_of_step in zip(range(STEPS), by_hand(lr), strict=False):
        u = rule_of_step(h * now, now)
        loss = float((h * now.square()).sum() / 2)
        if not loss < 1e37 or loss < 1e-30:  # losses are float32
            return
        row = next(rows)
        curve = [float((h * (now - s * u).square()).sum() / 2 / loss) for s in row["multiples"]]
        assert (row["step"], row["along"]) == (step, along)
        finite = [(a, b) for a, b in zip(row["relative"], curve, strict=True) if b * loss < 1e37]
        assert [a for a, _ in finite] == pytest.approx([b for _, b in finite], rel=1e-5)
        if all(abs(b - 1) > 1e-5 for s, b in zip(row["multiples"], curve, strict=True) if s > 0):
            check_bracket(row, expected(h, now, u))
        now = now - u
    assert next(rows, None) is None


def check_bracket(row: dict[str, Any], exact: float) -> None:
    value, bound = row["headroom"], row["headroom_bound"]
    if exact < GRID[0]:
        assert (value, bound) == (GRID[0], "below")
    elif exact > GRID[-1]:
        assert (value, bound) == (GRID[-1], "above")
    else:
        low = max(s for s in GRID if s <= exact)
        assert pd.isna(bound)
        assert low <= value <= exact * (1 + 1e-4)  # a chord of a convex function is above it


def test_adamw_at_a_rate_that_is_too_large_is_not_called_stable() -> None:
    """As its gradient, a tenth of it, would."""
    make = RULES["adamw"][0]
    for along, stable in ((None, False), ("gradient", True)):
        model = Quadratic([0.1, 0.1], [1.0, 1.0])
        first = records(model, make(model.parameters(), 3.0), along=along)[0]
        assert (first["headroom"] > 1) is stable


# Which step is followed


def plain(**options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, **options)


class OfAnotherClass(torch.optim.SGD): ...


class Clips(pl.LightningModule):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None: ...


class Edits(pl.Callback):
    def on_before_optimizer_step(self, *args: Any) -> None: ...


@pytest.mark.parametrize(
    ("optimizer", "run", "module", "along"),
    [
        (plain(), {}, pl.LightningModule(), "gradient"),
        (
            plain(dampening=0.1, foreach=True),
            {"callbacks": [pl.Callback(), GradientTails()]},
            nn.Linear(1, 1),
            "gradient",
        ),
        (plain(momentum=0.9), {}, pl.LightningModule(), "update"),
        (plain(momentum=0.9, nesterov=True), {}, pl.LightningModule(), "update"),
        (plain(weight_decay=0.1), {}, pl.LightningModule(), "update"),
        (plain(maximize=True), {}, pl.LightningModule(), "update"),
        (OfAnotherClass([nn.Parameter(torch.zeros(2))], lr=0.1), {}, pl.LightningModule(), "update"),
        (torch.optim.AdamW([nn.Parameter(torch.zeros(2))]), {}, pl.LightningModule(), "update"),
        (plain(), {"gradient_clip_val": 1.0}, pl.LightningModule(), "update"),
        (plain(), {"precision_plugin": SimpleNamespace(scaler=object())}, pl.LightningModule(), "update"),
        (plain(), {"callbacks": [Edits()]}, pl.LightningModule(), "update"),
        (plain(), {}, Clips(), "update"),
    ],
)
def test_the_update_is_followed_unless_it_is_the_plain_gradient_step(
    optimizer: torch.optim.Optimizer, run: dict[str, Any], module: Any, along: str
) -> None:
    run = {"callbacks": [], "precision_plugin": SimpleNamespace(scaler=None), "gradient_clip_val": None, **run}
    facts = LightningRun(SimpleNamespace(**run), module)  # type: ignore[arg-type]
    assert is_gradient_step(facts, optimizer) == (along == "gradient")


def test_momentum_that_a_scheduler_brings_in_changes_what_is_followed(tmp_path: Path) -> None:
    class Scheduled(SmallNet):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().param_groups[0]["momentum"] = 0.9 * (batch_idx >= 2)

    trainer(str(tmp_path), callbacks=[RelativeLoss(1)], max_steps=4).fit(Scheduled(), loader())
    frame = load_run(tmp_path / "log")["relative_loss"]
    assert frame["along"].tolist() == ["gradient", "gradient", "update", "update"]


def test_an_optimizer_that_shows_no_update(tmp_path: Path) -> None:
    from timm import optim

    class Wrapped(SmallNet):
        def configure_optimizers(self) -> Any:
            class Lookahead(optim.Lookahead):  # torch adds hooks to a class as soon as gradients are set to zero
                def step(self, closure: Any = None) -> Any:
                    return super().step(closure)

            return Lookahead(torch.optim.AdamW(self.parameters(), lr=1e-3))

    with pytest.raises(
        ValueError, match=r"Lookahead calls no step hooks .* pass along=\"gradient\", or train with the"
    ):
        trainer(str(tmp_path / "a"), callbacks=[RelativeLoss(1, along="update")], max_steps=2).fit(Wrapped(), loader())
    with pytest.warns(UserWarning, match="Lookahead calls no step hooks .*, and follows the gradient"):
        trainer(str(tmp_path / "b"), callbacks=[RelativeLoss(1)], max_steps=2).fit(Wrapped(), loader())
    assert load_run(tmp_path / "b" / "log")["relative_loss"]["along"].tolist() == ["gradient"] * 2


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_without_the_loss_scale(tmp_path: Path, fused: bool) -> None:
    """A fused optimizer takes it away inside of its step only; steps of infinite gradients leave no row."""
    measured = []

    class Net(SmallNet):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=fused)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (torch.inf if batch_idx == 1 else 1)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            scale = self.trainer.precision_plugin.scaler.get_scale() if fused else 1.0
            measured.append(self.net[6].weight.grad.norm().item() / scale)

    options: dict[str, Any] = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 512.0))]}
    folders = {along: str(tmp_path / along) for along in ("gradient", "update")}
    callbacks = [RelativeLoss(1, along=along, dirpath=folder) for along, folder in folders.items()]
    run = trainer(str(tmp_path), callbacks=[*callbacks, GradientTails(1)], max_steps=4, **options)
    run.fit(Net(), loader())
    tails = load_run(tmp_path / "log")["gradient_tails"]
    assert tails[tails["layer"] == "net.6.weight"]["l2"].tolist() == pytest.approx(measured, rel=1e-3, nan_ok=True)
    along_gradient, along_update = (load_run(folder)["relative_loss"] for folder in folders.values())
    assert along_gradient["step"].tolist() == along_update["step"].tolist() == [0, 2, 3]
    for a, b in zip(along_gradient["relative"], along_update["relative"], strict=True):
        assert a.tolist() == pytest.approx(b.tolist(), rel=1e-2)


@pytest.mark.parametrize("along", ["gradient", "update"])
def test_the_host_reads_nothing_in_the_step_that_is_sampled(tmp_path: Path, along: str) -> None:
    """The whole grid is evaluated whatever the losses are; they are read a step later."""
    model = Quadratic([1.0, 10.0], [1.0, -2.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0)
    seen = []
    callback = RelativeLoss(1, loss=lambda module, batch: module(), along=along)
    with watch(model, optimizer, callback, dirpath=tmp_path) as watching:
        for _ in range(2):
            model().backward()
            watching.batch(None)
            with Ops() as ops:
                optimizer.step()
            seen.append("_local_scalar_dense" in ops.seen)
    assert seen == [False, True]
    assert load_run(tmp_path)["relative_loss"]["headroom_bound"].tolist() == ["below"] * 2


# What the grid does not reach, and what is not a number


def test_a_loss_that_is_not_a_number_ends_the_headroom_and_is_no_zero(tmp_path: Path) -> None:
    curves = [[1.0, math.nan, math.nan], [1.0, 0.9, math.nan], [1.0, 0.9, math.inf], [1.0, 1.1, math.nan]]
    losses = iter([loss for curve in curves for loss in curve])
    callback = RelativeLoss(1, multiples=[1, 2], loss=lambda *_: torch.tensor(next(losses)))
    trainer(str(tmp_path), callbacks=[callback], max_steps=4).fit(SmallNet(), loader())
    frame = load_run(tmp_path / "log")["relative_loss"]
    found = [(v, None if pd.isna(b) else b) for v, b in zip(frame["headroom"], frame["headroom_bound"], strict=True)]
    assert found == [(1.0, "below"), (1.0, None), (1.0, None), (1.0, "below")]


ANY = st.sampled_from([math.nan, math.inf, -math.inf, 1.0]) | st.floats(-3, 3)


@given(
    st.lists(st.tuples(st.floats(1e-6, 1e6), ANY), min_size=1, max_size=8, unique_by=lambda pair: pair[0]),
    st.booleans(),
)
def test_a_bound_is_the_end_of_the_grid_and_the_value_else_lies_inside(
    points: list[tuple[float, float]], negative: bool
) -> None:
    multiples, relative = zip(*sorted(points), strict=True)
    stable = [math.isfinite(v) and (v >= 1 if negative else v <= 1) for v in relative]
    value, bound = bounded_headroom(multiples, relative, negative=negative)
    if not stable[0]:
        assert (value, bound) == (multiples[0], "below")
    elif all(stable):
        assert (value, bound) == (multiples[-1], "above")
    else:
        first = stable.index(False)
        assert bound is None
        assert multiples[first - 1] <= value <= multiples[first]
    lower = learning_rate_headroom(multiples, relative, negative=negative)
    assert lower == (0.0 if bound == "below" else value)


@pytest.mark.parametrize(
    ("headroom", "text"),
    [
        ((1 / 64, "below"), "<1/64"),
        ((0.3, "below"), "<0.3"),
        ((1.0, "below"), "<1"),
        ((8.0, "above"), ">8"),
        ((0.5, "above"), ">1/2"),
        ((1 / 64, None), "0.0156"),
        ((math.nan, None), "–"),
    ],
)
def test_headrooms_as_text(headroom: tuple[float, str | None], text: str) -> None:
    assert headroom_text(*headroom) == text


# The running quantile


@given(
    st.lists(st.floats(0.01, 10) | st.just(math.nan), max_size=30),
    st.floats(0.01, 0.99),
)
def test_the_quantile_is_numpys(values: list[float], quantile: float) -> None:
    known = [v for v in values if not math.isnan(v)]
    value, bound = headroom_quantile([(v, None) for v in values], quantile)
    assert bound is None
    if known:
        assert value == np.quantile(known, quantile, method="inverted_cdf")
    else:
        assert math.isnan(value)


def test_bounds_are_ordered_around_their_value() -> None:
    samples = [(1.0, "above"), (1.0, None), (2.0, "above"), (1.0, "below"), (2.0, None)]
    ordered = [headroom_quantile(samples, (i + 0.5) / 5) for i in range(5)]
    assert ordered == [(1.0, "below"), (1.0, None), (1.0, "above"), (2.0, None), (2.0, "above")]


def low_by_hand(frame: pd.DataFrame, window: int, quantile: float) -> list[float]:
    return [
        np.quantile(frame["headroom"][max(0, i + 1 - window) : i + 1], quantile, method="inverted_cdf")
        for i in range(len(frame))
    ]


def loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, steps: int, state: Any = None, **options: Any
) -> Any:
    """Some steps in a plain loop, with noise in the gradient; the state that it leaves."""
    logger, draw = options.pop("logger", None), torch.Generator().manual_seed(steps)
    callback = RelativeLoss(1, loss=lambda module, batch: module(), **options)
    watching = watch(model, optimizer, callback, dirpath=folder, logger=logger)
    if state is not None:
        watching.load_state_dict(state)
    with watching:
        for _ in range(steps):
            optimizer.zero_grad()
            model().backward()
            model.theta.grad += 3 * torch.randn(2, generator=draw, dtype=torch.float64)
            watching.batch(None)
            optimizer.step()
    return watching.state_dict()


@pytest.mark.parametrize("options", [{}, {"window": 3, "quantile": 0.5}])
def test_the_low_headroom_is_over_the_last_samples(tmp_path: Path, options: dict[str, Any]) -> None:
    logged: list[float] = []
    log = SimpleNamespace(log_metrics=lambda metrics, step: logged.append(metrics["relative_loss/headroom_low"]))
    model = Quadratic([1.0, 10.0], [1.0, -2.0])
    loop(model, torch.optim.SGD(model.parameters(), lr=0.05), tmp_path, 40, logger=log, **options)
    frame = load_run(tmp_path)["relative_loss"]
    want = low_by_hand(frame, options.get("window", 20), options.get("quantile", 0.1))
    assert frame["headroom_low"].tolist() == logged == want
    assert len(set(want)) > 3


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_low_headroom_goes_on_in_a_resumed_run_and_not_in_another(tmp_path: Path) -> None:
    def run(name: str, steps: int, callback: Any, ckpt_path: str | None = None) -> pd.DataFrame:
        pl.seed_everything(1, verbose=False)
        saves = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=5, save_top_k=-1)
        options: dict[str, Any] = {"logger": False, "enable_checkpointing": True, "max_steps": steps}
        made = trainer(str(tmp_path), callbacks=[callback, saves], **options)
        made.fit(SmallNet(lr=0.5), loader(), ckpt_path=ckpt_path, weights_only=False)
        return load_run(callback.dirpath)["relative_loss"]

    def callback(name: str) -> RelativeLoss:
        return RelativeLoss(1, multiples=[0.25, 1.0, 4.0, 16.0], dirpath=str(tmp_path / name), window=8)

    used = callback("parts")
    run("parts", 10, used)
    resumed = run("parts", 15, callback("parts"), str(tmp_path / "parts" / "step=10.ckpt"))
    assert resumed["step"].tolist() == list(range(15))
    assert resumed["headroom_low"].tolist() == low_by_hand(resumed, 8, 0.1)
    anew = run("parts", 5, used)
    assert anew["headroom_low"].tolist() == low_by_hand(anew, 8, 0.1)


def test_the_low_headroom_goes_on_in_a_plain_loop(tmp_path: Path) -> None:
    model = Quadratic([1.0, 10.0], [1.0, -2.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    state = loop(model, optimizer, tmp_path, 6, window=5)
    loop(model, optimizer, tmp_path, 7, state, window=5)
    frame = load_run(tmp_path)["relative_loss"]
    assert frame["step"].tolist() == list(range(13))
    assert frame["headroom_low"].tolist() == low_by_hand(frame, 5, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be a whole number of at least 1, not 0"),
        ({"window": 2.0}, "window must be a whole number of at least 1, not 2.0"),
        ({"quantile": 0.0}, "quantile must be between 0 and 1, not 0.0"),
        ({"quantile": 1.0}, "quantile must be between 0 and 1, not 1.0"),
    ],
)
def test_window_and_quantile_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RelativeLoss(**options)
