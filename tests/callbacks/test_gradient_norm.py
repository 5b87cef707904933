"""The norms of the gradient before and after clipping, against those that are taken by hand around the same step."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from callbacks_small import SmallNet, loader, trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins import MixedPrecision
from ranks import run_function
from timm.utils.agc import unitwise_norm
from watch_small import batch_loss, small_net

from normzoo import load_run, watch
from normzoo.callbacks import GradientNorm, GradientTails, gradient_norm
from normzoo.functional.spikes import modified_z_score
from normzoo.functional.unit_norms import largest_unit_ratio

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
SHAPES = [(), (0,), (3,), (70_000,), (4, 3), (8, 3, 5, 5)]
TWO_GROUPS = 3  # the parameters in the first of them


class Grouped(SmallNet):
    """Two parameter groups, and the norms of what its optimizer is given in each step, taken by the optimizer."""

    def __init__(self, kind: str = "sgd") -> None:
        super().__init__()
        self.kind = kind
        self.before: list[list[float]] = []
        self.applied: list[list[float]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        params = list(self.net.parameters())
        groups = [{"params": params[:TWO_GROUPS]}, {"params": params[TWO_GROUPS:], "lr": 0.01}]
        noted = self.applied

        class Notes(torch.optim.SGD):
            def _init_group(self, group: Any, *args: Any) -> Any:
                noted.append(norms_of([group]))
                return super()._init_group(group, *args)

        return Notes(groups, lr=0.05, momentum=0.9)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.before.append(norms_of(optimizer.param_groups))


def norms_of(groups: list[dict[str, Any]]) -> list[float]:
    return [
        math.sqrt(sum(p.grad.double().square().sum().item() for p in group["params"] if p.grad is not None))
        for group in groups
    ]


def fit(folder: Path, callback: GradientNorm, net: pl.LightningModule, **options: Any) -> pd.DataFrame:
    trainer(str(folder), callbacks=[callback], **{"max_steps": 8, **options}).fit(net, loader())
    return load_run(folder / "log")["gradient_norm"]


def of(frame: pd.DataFrame, name: str, column: str) -> list[float]:
    return frame[frame["of"] == name][column].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
    ids=["free", "by norm", "by value"],
)
def test_norms_are_those_that_the_optimizer_sees(tmp_path: Path, options: dict[str, Any]) -> None:
    net = Grouped()
    frame = fit(tmp_path, GradientNorm(layers=None), net, **options)
    applied = [[a, b] for (a,), (b,) in zip(net.applied[::2], net.applied[1::2], strict=True)]
    for column, expected in (("norm", net.before), ("applied", applied)):
        assert len(expected) == 8
        for group in range(2):
            found = of(frame, f"group_{group}", column)
            assert found == pytest.approx([norms[group] for norms in expected], rel=1e-5)
        assert of(frame, "", column) == pytest.approx([math.hypot(*norms) for norms in expected], rel=1e-5)
    assert set(frame["clipped"]) == {bool(options)}
    if "gradient_clip_algorithm" not in options and options:
        assert of(frame, "", "applied") == pytest.approx([0.5] * 8, rel=1e-4)
    factors = [a / b for a, b in zip(of(frame, "", "applied"), of(frame, "", "norm"), strict=True)]
    assert of(frame, "", "factor") == pytest.approx(factors)


def test_a_gradient_that_is_below_the_limit_is_not_clipped(tmp_path: Path) -> None:
    frame = fit(tmp_path, GradientNorm(layers=None), SmallNet(), gradient_clip_val=1e6)
    assert not frame["clipped"].any()
    assert frame["factor"].tolist() == [1.0] * 8


def test_a_module_that_clips_by_a_method_of_its_own_is_seen_to_clip(tmp_path: Path) -> None:
    class Net(SmallNet):
        def clip_gradients(self, optimizer: torch.optim.Optimizer, *args: Any, **options: Any) -> None:
            for p in self.parameters():
                p.grad *= 0.5

    frame = fit(tmp_path, GradientNorm(layers=None), Net(), max_steps=2)
    assert frame["factor"].tolist() == pytest.approx([0.5] * 2)


def test_a_group_that_is_added_while_a_step_is_measured_counts_from_the_next(tmp_path: Path) -> None:
    class Net(SmallNet):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net[:6].parameters(), lr=0.01)

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            if self.global_step == 1:
                optimizer.add_param_group({"params": list(self.net[6].parameters())})

    frame = fit(tmp_path, GradientNorm(layers=1), Net(), max_steps=3)
    norms = frame[frame["depth"].isna()]
    assert norms["of"].tolist() == ["", "", "", "group_0", "group_1"]
    assert norms["step"].tolist() == [0, 1, 2, 2, 2]
    assert norms["applied"].tolist() == norms["norm"].tolist()
    assert set(frame[frame["of"] == "net.6.weight"]["step"]) == {2}


def test_one_group_has_no_row_of_its_own(tmp_path: Path) -> None:
    frame = fit(tmp_path, GradientNorm(3, layers=None), SmallNet())
    assert set(frame["of"]) == {""}
    assert frame["step"].tolist() == [0, 3, 6]


def test_layers_are_as_by_hand(tmp_path: Path) -> None:
    class Notes(pl.Callback):
        def __init__(self) -> None:
            self.expected: dict[str, tuple[float, float]] = {}

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.before = {n: p.detach().clone() for n, p in pl_module.named_parameters()}
            self.grads = {n: p.grad.clone() for n, p in pl_module.named_parameters()}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            for name, p in pl_module.named_parameters():
                w, g = self.before[name], self.grads[name]
                ratio = (unitwise_norm(g) / unitwise_norm(w).clamp(min=1e-3)).max().item()
                moved = ((p.detach() - w).norm() / w.norm()).item()
                self.expected[name] = (ratio, moved)

    notes = Notes()
    callback = GradientNorm(every_n_steps=10, layers=lambda step: step == 5)
    trainer(str(tmp_path), callbacks=[notes, callback], max_steps=6, gradient_clip_val=0.5).fit(SmallNet(), loader())
    frame = load_run(tmp_path / "log")["gradient_norm"]
    layers = frame[frame["of"] != ""]
    assert set(layers["step"]) == {5}
    assert layers["of"].tolist() == list(notes.expected)
    assert layers["depth"].tolist() == list(range(len(layers)))
    for row, (ratio, moved) in zip(layers.to_dict("records"), notes.expected.values(), strict=True):
        assert row["unit_ratio"] == pytest.approx(ratio, rel=1e-5)
        assert row["relative_update"] == pytest.approx(moved, rel=1e-4)
    assert of(frame, "", "step") == [0, 5]


def test_a_parameter_that_is_zero_has_no_relative_update(tmp_path: Path) -> None:
    net = SmallNet()
    torch.nn.init.zeros_(net.net[6].bias)
    frame = fit(tmp_path, GradientNorm(layers=50), net, max_steps=1)
    row = frame[frame["of"] == "net.6.bias"].iloc[0]
    assert math.isnan(row["relative_update"])
    assert row["unit_ratio"] > 0  # against a norm of 1e-3


def test_a_step_that_a_grad_scaler_skips_applies_nothing(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**19, growth_interval=100)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    frame = fit(tmp_path, GradientNorm(layers=4, window=2), SmallNet(), plugins=[plugin], gradient_clip_val=1e3)
    total = frame[frame["of"] == ""]
    skipped = ~total["norm"].map(math.isfinite)
    assert 0 < skipped.sum() < len(total)
    assert total["applied"].isna().tolist() == skipped.tolist()
    assert total[skipped]["score"].isna().all()
    assert total[~skipped]["score"][2:].notna().all()


def test_a_closure_that_is_evaluated_several_times_is_measured_once(tmp_path: Path) -> None:
    class Net(SmallNet):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    frame = fit(tmp_path, GradientNorm(layers=None), Net(), gradient_clip_val=0.1, max_steps=4)
    assert of(frame, "", "step") == [0, 1, 2, 3]
    assert of(frame, "", "applied") == pytest.approx([0.1] * 4, rel=1e-4)


def test_two_optimizers_under_manual_optimization(tmp_path: Path) -> None:
    class Net(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.norms: list[tuple[int, float]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            optimizers = self.optimizers()
            self.manual_backward(loss)
            for i, optimizer in enumerate(optimizers):
                if (batch_idx + i) % 2:
                    continue
                self.norms.append((i, norms_of(optimizer.param_groups)[0]))
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            return loss

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            params = list(self.net.parameters())
            return [torch.optim.SGD(params[:3], lr=0.1), torch.optim.Adam(params[3:], lr=0.01)]

    net = Net()
    frame = fit(tmp_path, GradientNorm(layers=None), net)
    assert list(zip(frame["optimizer"], frame["norm"].round(4), strict=True)) == [
        (i, round(n, 4)) for i, n in net.norms
    ]
    assert frame["applied"].tolist() == frame["norm"].tolist()


@pytest.mark.parametrize("tells", [False, True])
def test_a_plain_loop_tells_when_it_clips(tmp_path: Path, tells: bool) -> None:
    torch.manual_seed(0)
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    norms = []
    with watch(model, optimizer, GradientNorm(layers=2), dirpath=tmp_path) as watching:
        for batch in list(loader())[:4]:
            optimizer.zero_grad()
            batch_loss(model, batch).backward()
            if tells:
                watching.before_clipping()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)))
            optimizer.step()
    frame = load_run(tmp_path)["gradient_norm"]
    assert of(frame, "", "step") == [0, 1, 2, 3]
    assert of(frame, "", "norm") == pytest.approx(norms if tells else [0.3] * 4, rel=1e-4)
    assert of(frame, "", "applied") == pytest.approx([0.3] * 4, rel=1e-4)
    assert of(frame, "", "clipped") == [tells] * 4
    assert set(frame[frame["of"] != ""]["step"]) == {0, 2}


def test_a_loop_whose_scaler_skips_a_step_goes_on(tmp_path: Path) -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with watch(model, optimizer, GradientNorm(layers=None), dirpath=tmp_path) as watching:
        for i, batch in enumerate(list(loader())[:4]):
            optimizer.zero_grad()
            scaler.scale(batch_loss(model, batch)).backward()
            if i == 1:
                next(model.parameters()).grad.fill_(math.inf)
            scaler.unscale_(optimizer)
            watching.before_clipping()
            scaler.step(optimizer)
            scaler.update()
    frame = load_run(tmp_path)["gradient_norm"]
    assert frame["step"].tolist() == [0, 1, 2]  # of the step that was skipped there is no row: the loop made none
    assert frame["norm"].map(math.isfinite).all()
    assert frame["applied"].tolist() == frame["norm"].tolist()


@pytest.mark.parametrize("told", [False, True])
def test_a_step_that_a_fused_optimizer_skips_applies_nothing(tmp_path: Path, told: bool) -> None:
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with watch(model, optimizer, GradientNorm(layers=1), dirpath=tmp_path) as watching:
        for i, batch in enumerate(list(loader())[:3]):
            optimizer.zero_grad()
            scaler.scale(batch_loss(model, batch)).backward()
            if i == 1:
                next(model.parameters()).grad.fill_(math.inf)
            scaler.unscale_(optimizer)
            if told:
                watching.before_clipping()
            scaler.step(optimizer)
            scaler.update()
    frame = load_run(tmp_path)["gradient_norm"]
    total = frame[frame["of"] == ""]
    assert total["norm"].map(math.isfinite).tolist() == [True, False, True]
    assert total["applied"].isna().tolist() == [False, True, False]
    updates = frame[frame["of"] == "6.weight"]["relative_update"]
    assert updates.isna().tolist() == [False, True, False]


def test_two_optimizers_of_a_plain_loop_are_each_measured_before_clipping(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
    model = torch.nn.Sequential(first, second)
    optimizers = {part: torch.optim.SGD(part.parameters(), lr=0.1) for part in (first, second)}
    norms = []
    with watch(model, [*optimizers.values()], GradientNorm(layers=None), dirpath=tmp_path) as watching:
        for step in range(6):
            part = first if step % 3 else second
            optimizers[part].zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            watching.before_clipping(optimizers[part])
            norms.append(float(torch.nn.utils.clip_grad_norm_(part.parameters(), 0.05)))
            optimizers[part].step()
        model.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        watching.before_clipping(*optimizers.values())  # both before either steps
        for part, optimizer in optimizers.items():
            norms.append(float(torch.nn.utils.clip_grad_norm_(part.parameters(), 0.05)))
            optimizer.step()
    frame = load_run(tmp_path)["gradient_norm"]
    assert frame["step"].tolist() == list(range(8))
    assert frame["optimizer"].tolist() == [1, 0, 0, 1, 0, 0, 0, 1]
    assert frame["norm"].tolist() == pytest.approx(norms, rel=1e-5)
    assert frame["applied"].tolist() == pytest.approx([0.05] * 8, rel=1e-4)


def test_the_last_call_before_a_step_counts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = []
    with watch(model, optimizer, GradientNorm(layers=1), dirpath=tmp_path) as watching:
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(2):
                model(torch.randn(8, 4)).square().mean().backward()
                watching.before_clipping()
            norms.append(norms_of(optimizer.param_groups)[0])
            optimizer.step()
    frame = load_run(tmp_path)["gradient_norm"]
    assert frame["step"].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert of(frame, "", "norm") == pytest.approx(norms, rel=1e-5)
    assert frame[frame["of"] != ""]["relative_update"].notna().all()


def test_before_clipping_is_refused_where_it_cannot_be_right(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 1)
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in model.parameters()]
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizers, GradientNorm(), dirpath=tmp_path) as watching:
        with pytest.raises(ValueError, match=r"was given none of 2 optimizers; give the one whose step comes next"):
            watching.before_clipping()
        with pytest.raises(ValueError, match=r"takes optimizers that were given to watch, not a SGD"):
            watching.before_clipping(other)
        with pytest.raises(ValueError, match=r"while no parameter has a gradient; call it after loss.backward\(\)"):
            watching.before_clipping(optimizers[0])
        model(torch.randn(8, 4)).sum().backward()
        watching.before_clipping(optimizers[0])
        optimizers[0].step()
        with pytest.raises(ValueError, match=r"a step had been made with these gradients; call it after loss.backwa"):
            watching.before_clipping(optimizers[0])
        model(torch.randn(8, 4)).sum().backward()  # added to those before
        watching.before_clipping(optimizers[0])


def test_a_step_at_the_end_of_an_epoch_applies_what_it_was_given(tmp_path: Path) -> None:
    class Net(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(batch_loss(self.net, batch))

        def on_train_epoch_end(self) -> None:
            self.optimizers().step()
            self.optimizers().zero_grad()

    options = {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 2}
    frame = fit(tmp_path, GradientNorm(layers=None), Net(), **options)
    assert len(frame) == 2
    assert frame["applied"].tolist() == frame["norm"].tolist()


@pytest.mark.parametrize("clips", [False, True])
def test_an_optimizer_that_runs_no_hooks_is_measured_before_its_step(tmp_path: Path, clips: bool) -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner, self.state, self.defaults = inner, inner.state, inner.defaults
            self.param_groups = inner.param_groups

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.inner.zero_grad(set_to_none)

    class Net(SmallNet):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return Wrapper(super().configure_optimizers())

    limit = 0.5 if clips else None
    frame = fit(tmp_path, GradientNorm(layers=1), Net(), max_steps=2, gradient_clip_val=limit)
    assert all(norm > 0 for norm in of(frame, "", "norm"))
    total = frame[frame["of"] == ""]
    assert total["applied"].isna().all() if clips else total["applied"].tolist() == total["norm"].tolist()
    assert frame[frame["of"] != ""]["unit_ratio"].notna().all()
    assert frame["relative_update"].isna().all()


def test_the_gradient_of_a_parameter_frozen_before_the_step_counts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, GradientNorm(layers=1), dirpath=tmp_path):
        model(torch.randn(8, 4)).square().mean().backward()
        model.weight.requires_grad_(False)  # the optimizer moves it nonetheless
        optimizer.step()
        norms = norms_of(optimizer.param_groups)
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    frame = load_run(tmp_path)["gradient_norm"]
    assert of(frame, "", "norm")[0] == pytest.approx(norms[0], rel=1e-5)
    assert of(frame, "weight", "step") == [0]
    assert of(frame, "bias", "depth") == [1, 1]


def test_a_callback_is_pickled_while_a_step_is_made(tmp_path: Path) -> None:
    class Pickles(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.label = pickle.loads(pickle.dumps(trainer.callbacks[0])).label

    callbacks = [GradientNorm(layers=1, label="one"), pickles := Pickles()]
    trainer(str(tmp_path), callbacks=callbacks, max_steps=2).fit(SmallNet(), loader())
    assert pickles.label == "one"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_fit_that_is_cut_short_has_its_last_step_in_the_record(tmp_path: Path, error: type[BaseException]) -> None:
    class Fails(SmallNet):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                raise error

    with pytest.raises((error, SystemExit)):
        fit(tmp_path, GradientNorm(layers=None), Fails())
    frame = load_run(tmp_path / "log")["gradient_norm"]
    assert frame["step"].tolist() == [0, 1, 2]
    assert frame["applied"].tolist() == frame["norm"].tolist()


def test_what_is_not_finite_joins_no_history(tmp_path: Path) -> None:
    callback = GradientNorm(window=3)
    norms = [1.0, 1.2, math.inf, 0.9, math.nan, 5.0, 1.1]
    found = [callback.score(norm) for norm in norms]
    assert found[:5] == [None] * 5
    assert found[5] == modified_z_score(5.0, [1.0, 1.2, 0.9])
    assert found[6] == modified_z_score(1.1, [1.2, 0.9, 5.0])


@given(st.lists(st.floats(1e-3, 1e3), max_size=12), st.integers(1, 5), st.integers(0, 12))
@settings(max_examples=50)
def test_history_survives_its_state(norms: list[float], window: int, at: int) -> None:
    whole = GradientNorm(window=window)
    expected = [whole.score(norm) for norm in norms]
    first, second = GradientNorm(window=window), GradientNorm(window=window)
    found = [first.score(norm) for norm in norms[:at]]
    second.load_state_dict(first.state_dict())
    assert found + [second.score(norm) for norm in norms[at:]] == expected


@given(
    st.lists(st.integers(1, 5), max_size=4),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(max_examples=50)
def test_the_ratio_of_units_is_that_of_a_loop(shape: list[int], seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    g, w = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype) * 10.0 ** torch.randint(-5, 2, ())
    w = w.to(dtype)
    units = [(g, w)] if g.ndim < 2 else list(zip(g, w, strict=True))
    expected = max(u.double().norm() / max(v.double().norm(), torch.tensor(1e-3)) for u, v in units)
    assert largest_unit_ratio(g, w).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be a whole number of norms above 0, not 0"),
        ({"window": 2.0}, "window must be a whole number of norms above 0, not 2.0"),
        ({"layers": 0}, "layers must be at least 1, not 0"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, not 0"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientNorm(**options)


# Beside GradientTails


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("parameters", ["*", "net.6.*"])
def test_beside_gradient_tails_the_gradients_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool, parameters: str
) -> None:
    read: list[int] = []
    norms_of_all = gradient_norm._norms

    def reads(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        read.extend(t.numel() for t in tensors)
        return norms_of_all(tensors)

    monkeypatch.setattr(gradient_norm, "_norms", reads)
    tails = GradientTails(2, parameters=parameters)
    callbacks = [tails, GradientNorm(layers=None)] if first else [GradientNorm(layers=None), tails]
    counted: list[int] = []
    count = tails.histograms
    monkeypatch.setattr(tails, "histograms", lambda *args: counted.append(1) or count(*args))
    pl.seed_everything(1, verbose=False)
    net = Grouped()
    trainer(str(tmp_path), callbacks=callbacks, max_steps=4).fit(net, loader())
    frames = load_run(tmp_path / "log")
    for group in range(2):
        found = of(frames["gradient_norm"], f"group_{group}", "norm")
        assert found == pytest.approx([norms[group] for norms in net.before], rel=1e-5)
    assert len(counted) == 2  # of GradientTails' own steps
    sizes = [p.numel() for p in net.net.parameters()]
    both_norms = 2  # Grouped has a hook that could change the gradients
    left = [] if parameters == "*" else sizes[:-2]
    assert sorted(read) == sorted(2 * both_norms * sizes + 2 * (left + sizes))


def test_gradients_that_are_replaced_between_both_are_read_again(tmp_path: Path) -> None:
    class Replaces(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            for p in pl_module.parameters():
                p.grad = p.grad * 0.5

    callbacks = [GradientNorm(layers=None), Replaces(), GradientTails(1)]
    trainer(str(tmp_path), callbacks=callbacks, max_steps=2).fit(SmallNet(), loader())
    frames = load_run(tmp_path / "log")
    tails, norms = frames["gradient_tails"], frames["gradient_norm"]
    for step in range(2):
        l2 = tails[tails["step"] == step]["l2"]
        row = norms[norms["step"] == step].iloc[0]
        assert math.sqrt((l2**2).sum()) == pytest.approx(row["norm"] / 2, rel=1e-5)
        assert row["applied"] == pytest.approx(row["norm"] / 2, rel=1e-5)


class Poison(pl.Callback):
    """Makes the last unit of each gradient NaN at one step, on all ranks."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 3:
            for p in pl_module.parameters():
                p.grad[-1] = math.nan


def of_two_ranks(folder: str) -> None:
    pl.seed_everything(1, verbose=False)
    callbacks = [Poison(), GradientNorm(layers=3), GradientTails(2)]
    trainer(folder, callbacks=callbacks, max_steps=4, strategy="ddp", devices=2).fit(Grouped(), loader())
    torch.distributed.destroy_process_group()


def test_on_two_ranks_beside_gradient_tails_norms_are_whole(tmp_path: Path) -> None:
    run_function(tmp_path, of_two_ranks, 2, str(tmp_path))
    frames = load_run(tmp_path / "log")
    tails = frames["gradient_tails"]
    norms = frames["gradient_norm"]
    for step in (0, 2):
        l2 = tails[tails["step"] == step]["l2"]
        total = norms[(norms["step"] == step) & (norms["of"] == "")]["norm"].item()
        assert total == pytest.approx(math.sqrt((l2**2).sum()), rel=1e-6)
    assert of(norms, "", "step") == [0, 1, 2, 3]
    ratios = norms[norms["of"].str.startswith("net.")].groupby("step")["unit_ratio"]
    assert ratios.count().to_dict() == {0: 5, 3: 0}  # no rank's NaN is lost


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.booleans()), max_size=8))
def test_squared_norms_are_those_of_the_tensors_one_by_one(
    kinds: list[tuple[torch.dtype, tuple[int, ...], bool]],
) -> None:
    tensors = [torch.randn(shape).to(dtype) for dtype, shape, _ in kinds]
    tensors = [t.transpose(0, -1) if t.ndim and turned else t for t, (_, _, turned) in zip(tensors, kinds, strict=True)]
    real = [(t.abs() if t.is_complex() else t).double() for t in tensors]
    found = gradient_norm._squares(tensors, torch.device("cpu"))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([t.square().sum().item() for t in real], rel=1e-5)
