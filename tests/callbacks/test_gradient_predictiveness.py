"""GradientPredictiveness against gradients taken by hand on copies of the network, and what it leaves behind."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from callbacks_small import SmallNet, TwoOptimizers, images, loader, trainer
from ranks import run_function
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import normzoo
from normzoo import load_run
from normzoo.callbacks import GradientPredictiveness
from normzoo.report.drawing import draw_figure

MULTIPLES = [-1.0, 0.0, 0.5, 1.0, 4.0]
STEPS = 4
LISTS = ("loss", "distance", "gradient_change", "cosine")
SCALARS = ("start_loss", "gradient_norm", "smoothness", "worst_cosine", "largest_change", "loss_range")


def rows(folder: Path) -> list[dict[str, Any]]:
    return load_run(folder)["gradient_predictiveness"].to_dict("records")


def network() -> nn.Module:
    torch.manual_seed(7)
    layers = nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4)
    return nn.Sequential(*layers).double()


def groups(net: nn.Module) -> list[dict[str, Any]]:
    weights, others = ([p for p in net.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
    return [{"params": weights, "lr": 0.3}, {"params": others, "lr": 0.02, "weight_decay": 0.0}]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda g: torch.optim.SGD(g, momentum=0.9, weight_decay=0.01),
    "adamw": lambda g: torch.optim.AdamW(g, weight_decay=0.1),
}


class Module(pl.LightningModule):
    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        self.net, self.optimizer = network(), optimizer

    def training_step(self, batch: Any) -> Tensor | None:  # Lightning lets the index be left out
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](groups(self.net))


def batches(micro: int = 1) -> DataLoader:
    x, y = images(micro * STEPS * 8).tensors
    return DataLoader(TensorDataset(x.double(), y), batch_size=8)


def fit(folder: Path, module: pl.LightningModule, callback: Any, micro: int = 1, **options: Any) -> pl.Trainer:
    options = {"max_steps": STEPS, "accumulate_grad_batches": micro, **options}
    made = trainer(str(folder), callbacks=[callback], **options)
    made.fit(module, batches(micro))
    return made


def at(net: nn.Module, origin: list[Tensor], step: list[Tensor], s: float, batch: Any) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient and place at a multiple of the step."""
    moved = copy.deepcopy(net)
    params = list(moved.parameters())
    with torch.no_grad():
        for p, p0, u in zip(params, origin, step, strict=True):
            p.copy_(p0 - s * u)
    loss = F.cross_entropy(moved(batch[0]), batch[1])
    flat = [nn.utils.parameters_to_vector(t) for t in (torch.autograd.grad(loss, params), params)]
    return loss.item(), flat[0], flat[1].detach()


def expected(net: nn.Module, origin: list[Tensor], step: list[Tensor], batch: Any) -> dict[str, Any]:
    loss, g, place = at(net, origin, step, 0.0, batch)
    row: dict[str, Any] = {name: [] for name in LISTS}
    for s in MULTIPLES:
        other_loss, other, there = at(net, origin, step, s, batch)
        row["loss"].append(other_loss)
        row["distance"].append((there - place).norm().item())
        row["gradient_change"].append((other - g).norm().item())
        row["cosine"].append((other @ g / other.norm() / g.norm()).item())
    slopes = [c / d for c, d in zip(row["gradient_change"], row["distance"], strict=True) if d]
    row |= {"start_loss": loss, "gradient_norm": g.norm().item(), "smoothness": max(slopes)}
    row |= {"worst_cosine": min(row["cosine"]), "largest_change": max(row["gradient_change"]) / g.norm().item()}
    return {**row, "loss_range": max([*row["loss"], loss]) - min([*row["loss"], loss])}


def by_hand(optimizer: str, clip: float | None, micro: int, along: str) -> Iterator[dict[str, Any]]:
    net = network()
    made = OPTIMIZERS[optimizer](groups(net))
    params, given = list(net.parameters()), iter(batches(micro))
    for _ in range(STEPS):
        made.zero_grad()
        for _ in range(micro):
            batch = next(given)
            (F.cross_entropy(net(batch[0]), batch[1]) / micro).backward()
        origin = [p.detach().clone() for p in params]
        lr = {p: group["lr"] for group in made.param_groups for p in group["params"]}
        step = [lr[p] * p.grad for p in params]
        if clip:
            nn.utils.clip_grad_norm_(params, clip)
        made.step()
        update = [p0 - p.detach() for p0, p in zip(origin, params, strict=True)]
        yield expected(net, origin, step if along == "gradient" else update, batch)


EVERY = [(o, c, m, a) for o in OPTIMIZERS for c in (None, 0.05) for m in (1, 3) for a in ("gradient", "update")]
FAST = {("sgd", 0.05, 3, "gradient"), ("adamw", None, 1, "update")}


@pytest.mark.parametrize(
    ("optimizer", "clip", "micro", "along"),
    [pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow]) for case in EVERY],
)
def test_the_curves_are_those_of_a_loop_by_hand(
    tmp_path: Path, optimizer: str, clip: float | None, micro: int, along: str
) -> None:
    callback = GradientPredictiveness(1, multiples=MULTIPLES, along=along)
    fit(tmp_path, Module(optimizer), callback, micro, gradient_clip_val=clip)
    found = rows(tmp_path / "log")
    assert [(r["step"], r["along"], r["lr"], r["optimizer"]) for r in found] == [(i, along, 0.3, 0) for i in range(4)]
    for row, want in zip(found, by_hand(optimizer, clip, micro, along), strict=True):
        assert row["multiples"].tolist() == MULTIPLES
        for name in LISTS:
            assert row[name].tolist() == pytest.approx(want[name], rel=1e-8, abs=1e-12), name
        for name in SCALARS:
            assert row[name] == pytest.approx(want[name], rel=1e-8), name


def test_all_points_have_the_same_draws_and_the_run_is_the_same(tmp_path: Path) -> None:
    """A step of 1e-30 moves zeros alone: with other draws of dropout, loss and gradient would differ."""
    ends = []
    for folder, every in (("off", 100), ("on", 1)):
        torch.manual_seed(0)
        module = SmallNet("adamw")
        callback = GradientPredictiveness(every, multiples=[1e-30, 1.0])
        callbacks = [callback] if folder == "on" else []
        made = trainer(str(tmp_path / folder), callbacks=callbacks, max_steps=4)
        made.fit(module, loader())
        state = made.optimizers[0].state_dict()["state"]
        gradients = [p.grad for p in module.parameters()]
        moments = [value for p in state.values() for value in p.values()]
        ends.append([*module.state_dict().values(), *gradients, *moments, torch.rand(3), torch.tensor(module.calls)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    for row in rows(tmp_path / "on" / "log"):
        assert row["loss"][0] == row["start_loss"] != row["loss"][1]
        assert row["distance"][0] < 1e-28
        assert row["gradient_change"][0] == 0
        assert row["gradient_change"][1] > 0
        assert row["smoothness"] == row["gradient_change"][1] / row["distance"][1]


class Moves(Module):
    """Has another loss once its parameters have moved from where the batch found them."""

    far: Callable[[Tensor], Tensor | None] = staticmethod(lambda loss: None)
    near: Callable[[Tensor], Tensor | None] = staticmethod(lambda loss: loss)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.start = self.net[1].weight.detach().clone()

    def training_step(self, batch: Any) -> Tensor | None:
        moved = not torch.equal(self.start, self.net[1].weight)
        loss = super().training_step(batch)
        assert loss is not None
        return self.far(loss) if moved else self.near(loss)


@pytest.mark.parametrize(
    "far", [lambda loss: None, lambda loss: loss * math.nan, lambda loss: loss * math.inf], ids=["none", "nan", "inf"]
)
def test_a_far_point_without_a_finite_loss_is_an_infinite_change(tmp_path: Path, far: Any) -> None:
    module = Moves()
    module.far = far
    fit(tmp_path, module, GradientPredictiveness(1))
    found = rows(tmp_path / "log")
    assert len(found) == STEPS
    for row in found:
        assert math.isfinite(row["start_loss"])
        assert math.isfinite(row["gradient_norm"])
        assert (row["smoothness"], row["largest_change"], row["loss_range"]) == (math.inf,) * 3
        assert math.isnan(row["worst_cosine"])
        assert not np.isfinite(row["loss"]).any()
        assert np.isfinite(row["distance"]).all()
    assert all(p.isfinite().all() for p in module.parameters())
    drawn = draw_figure(GradientPredictiveness.figures[2], {"": load_run(tmp_path / "log")["gradient_predictiveness"]})
    assert drawn is not None
    assert drawn.panels[0].series[0].y.tolist() == [1e9] * STEPS  # not left out, as if all were well


def test_a_start_that_is_not_finite_is_recorded_without_figures(tmp_path: Path) -> None:
    module = Moves()
    module.near = module.far = lambda loss: loss * math.nan
    fit(tmp_path, module, GradientPredictiveness(1), max_steps=1)
    [row] = rows(tmp_path / "log")
    assert all(math.isnan(row[name]) for name in SCALARS)


@pytest.mark.parametrize("along", ["gradient", "update"])
def test_a_step_that_moves_nothing_leaves_no_row(tmp_path: Path, along: str) -> None:
    class Still(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    fit(tmp_path, Still(), GradientPredictiveness(1, along=along), max_steps=2)
    assert rows(tmp_path / "log") == []


def test_sparse_gradients_unused_and_frozen_parameters(tmp_path: Path) -> None:
    """Only the embedding and the slope are used and trained: for x = e * w the gradient is that of two numbers."""

    class Embeds(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 1, sparse=True)
            self.slope, self.unused = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(3))
            self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            index = torch.tensor([2])
            return (self.embedding(index) * self.slope * self.frozen).square().sum() / 2

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for along in ("gradient", "update"):
        torch.manual_seed(0)
        module = Embeds()
        e, w = module.embedding.weight[2].item(), 1.0
        fit(tmp_path / along, module, GradientPredictiveness(1, multiples=[1.0], along=along), max_steps=1)
        [row] = rows(tmp_path / along / "log")
        g = np.array([e * w * w, e * e * w])
        e2, w2 = np.array([e, w]) - 0.1 * g
        there = np.array([e2 * w2 * w2, e2 * e2 * w2])
        assert row["gradient_norm"] == pytest.approx(np.linalg.norm(g), rel=1e-5)
        assert row["gradient_change"].tolist() == pytest.approx([np.linalg.norm(there - g)], rel=1e-4)
        assert row["distance"].tolist() == pytest.approx([0.1 * np.linalg.norm(g)], rel=1e-4)


def test_each_optimizer_has_its_parameters_and_its_loss(tmp_path: Path) -> None:
    """Where the optimizers take turns, the gradient is that of one's own parameters, the loss one's own."""

    def loss(module: Any, batch: Any) -> Tensor:
        return module.net(batch[0]).square().mean()

    losses = [loss, lambda module, batch: 3 * loss(module, batch)]
    made = {name: GradientPredictiveness(1, loss=f, label=name) for name, f in (("one", loss), ("each", losses))}
    trainer(str(tmp_path), callbacks=[*made.values()], max_steps=4).fit(TwoOptimizers(), loader())
    one, each = (rows(tmp_path / "log" / name) for name in made)
    assert [row["optimizer"] for row in one] == [row["optimizer"] for row in each] == [0, 1, 0, 1]
    for a, b in zip(one, each, strict=True):
        factor = 3 if a["optimizer"] else 1
        for name in ("start_loss", "gradient_norm", "smoothness", "loss_range"):
            assert b[name] == pytest.approx(factor * a[name], rel=1e-4), name
        assert b["distance"].tolist() == a["distance"].tolist()
    assert one[0]["gradient_norm"] != pytest.approx(one[1]["gradient_norm"], rel=0.01)
    logged = (tmp_path / "log" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "one/gradient_predictiveness/smoothness/optimizer_1" in logged


class Checkpointed(Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant

    def training_step(self, batch: Any) -> Tensor:
        x = self.net[1](self.net[0](batch[0]))
        tail = self.net[2:]
        y = tail(x) if self.reentrant is None else checkpoint(tail, x, use_reentrant=self.reentrant)
        return F.cross_entropy(y, batch[1])


def test_checkpoints_give_the_same_unless_they_are_reentrant(tmp_path: Path) -> None:
    for reentrant in (None, False):
        fit(tmp_path / str(reentrant), Checkpointed(reentrant), GradientPredictiveness(1))
    plain, checkpointed = (rows(tmp_path / str(reentrant) / "log") for reentrant in (None, False))
    for a, b in zip(plain, checkpointed, strict=True):
        assert b["gradient_change"].tolist() == pytest.approx(a["gradient_change"].tolist(), rel=1e-9)
    with pytest.raises(ValueError, match=r"^GradientPredictiveness takes gradients by .*; pass use_reentrant=False$"):
        fit(tmp_path / "reentrant", Checkpointed(True), GradientPredictiveness(1))


@pytest.mark.slow
def test_a_compiled_module_is_measured_as_it_is_uncompiled(tmp_path: Path) -> None:
    class Compiled(Module):
        def __init__(self) -> None:
            super().__init__()
            self.compiled = [torch.compile(self.net, backend="aot_eager")]

        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.compiled[0](batch[0]), batch[1])

    for name, kind in (("plain", Module), ("compiled", Compiled)):
        fit(tmp_path / name, kind(), GradientPredictiveness(1))
    plain, compiled = (rows(tmp_path / name / "log") for name in ("plain", "compiled"))
    for a, b in zip(plain, compiled, strict=True):
        assert b["gradient_change"].tolist() == pytest.approx(a["gradient_change"].tolist(), rel=1e-6)
        assert b["smoothness"] == pytest.approx(a["smoothness"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"along": "step"}, ValueError, "^along must be one of 'gradient', 'update', not 'step'$"),
        ({"along": None}, ValueError, "^along must be one of 'gradient', 'update', not None$"),
        ({"multiples": [0.0, -1.0]}, ValueError, "multiples must hold at least one value above 0"),
        ({"multiples": "12"}, TypeError, "multiples must be a list of numbers, not '12'"),
        ({"loss": "mse"}, TypeError, "loss must be a function of"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GradientPredictiveness(**options)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda *_: torch.ones(2), TypeError, r"needs a loss that is a tensor of one value, not one of shape \(2,\)$"),
        (lambda *_: 1.0, TypeError, "needs a loss that is a tensor of one value, not a float$"),
        (lambda *_: torch.ones(()), ValueError, "differentiates the loss, and this one requires no gradient; return"),
        ([min, max], ValueError, "takes one loss for all optimizers or one for each; 2 were given, and the number of "),
    ],
)
def test_losses_that_cannot_be_differentiated_are_refused(
    tmp_path: Path, loss: Any, error: type[Exception], message: str
) -> None:
    module = Module()
    with pytest.raises(error, match=f"^GradientPredictiveness {message}"):
        fit(tmp_path, module, GradientPredictiveness(1, loss=loss))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), network().parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_runs_that_cannot_be_measured_are_refused(tmp_path: Path) -> None:
    class Iterates(Module):
        def training_step(self, dataloader_iter: Any) -> None:  # type: ignore[override]
            raise AssertionError

    with pytest.raises(ValueError, match=r"cannot know the batch .* dataloader_iter; pass loss=, a function of"):
        fit(tmp_path, Iterates(), GradientPredictiveness(1))
    with pytest.raises(ValueError, match="under manual optimization takes optimizer steps of its own; pass loss=, a "):
        trainer(str(tmp_path), callbacks=[GradientPredictiveness(1)]).fit(TwoOptimizers(), loader())
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"in a plain loop; pass loss=, .*, and call watching.batch\(batch\)"):
        normzoo.watch(model, torch.optim.SGD(model.parameters()), GradientPredictiveness(1))


def test_ranks_of_different_parameters_are_refused() -> None:
    run: Any = SimpleNamespace(averages_locally=True)
    with pytest.raises(
        ValueError, match="^GradientPredictiveness needs ranks with the same parameters, and local SGD "
    ):
        GradientPredictiveness(loss=lambda *_: torch.ones(())).check(run)


def test_an_update_without_hooks_is_refused_and_the_gradient_followed(tmp_path: Path) -> None:
    class Bare(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                loss = closure()
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad)
            return loss

    class Unhooked(Module):
        def configure_optimizers(self) -> Any:
            made = Bare(self.parameters(), lr=0.1)
            Bare.step.hooked = False  # type: ignore[attr-defined]
            return made

    with pytest.raises(ValueError, match=r"^Bare calls no step hooks .* so GradientPredictiveness cannot see its upda"):
        fit(tmp_path / "update", Unhooked(), GradientPredictiveness(1, along="update"))
    fit(tmp_path / "gradient", Unhooked(), GradientPredictiveness(1))
    assert len(rows(tmp_path / "gradient" / "log")) == STEPS


def measured_on_ranks(folder: str) -> None:
    """Each rank has half of every batch."""
    x, y = images(STEPS * 8).tensors
    rank = int(os.environ["RANK"])
    ours = [range(8 * i + 4 * rank, 8 * i + 4 * rank + 4) for i in range(STEPS)]
    data = DataLoader(TensorDataset(x.double(), y), batch_sampler=ours)
    callback = GradientPredictiveness(1, multiples=MULTIPLES)
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    trainer(folder, callbacks=[callback], max_steps=STEPS, **options).fit(Module(), data)


def test_ranks_record_the_mean_of_their_gradients_with_batch_norm_of_each_rank(tmp_path: Path) -> None:
    run_function(tmp_path, measured_on_ranks, 2, str(tmp_path))
    net = network()
    made = OPTIMIZERS["sgd"](groups(net))
    params = list(net.parameters())
    lr = {p: group["lr"] for group in made.param_groups for p in group["params"]}
    found = rows(tmp_path / "log")
    assert len(found) == STEPS
    for row, (x, y) in zip(found, batches(), strict=True):
        origin = [p.detach().clone() for p in params]
        halves = [(x[:4], y[:4]), (x[4:], y[4:])]

        def mean(s: float, step: list[Tensor], origin: Any = origin, halves: Any = halves) -> tuple[float, Tensor]:
            both = [at(net, origin, step, s, half) for half in halves]
            return (both[0][0] + both[1][0]) / 2, (both[0][1] + both[1][1]) / 2

        still = [torch.zeros_like(p) for p in params]
        loss, g = mean(0.0, still)
        made.zero_grad()
        for p, value in zip(params, g.split([p.numel() for p in params]), strict=True):
            p.grad = value.view_as(p).clone()
        step = [lr[p] * p.grad for p in params]
        there = [mean(s, step) for s in MULTIPLES]
        assert row["start_loss"] == pytest.approx(loss, rel=1e-9)
        assert row["gradient_norm"] == pytest.approx(g.norm().item(), rel=1e-9)
        assert row["loss"].tolist() == pytest.approx([value for value, _ in there], rel=1e-9)
        changes = [(other - g).norm().item() for _, other in there]
        assert row["gradient_change"].tolist() == pytest.approx(changes, rel=1e-8, abs=1e-12)
        made.step()
