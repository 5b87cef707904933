"""With several optimizers each is sampled by its own count of steps, whatever the others do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from callbacks_small import SmallNet, loader, trainer
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from sweeps import few
from torch import Tensor, nn

from normzoo import load_run, watch
from normzoo.callbacks import ChannelMoments, Divergence, Every, GradientTails, LogSpaced, RelativeLoss, Warmup
from normzoo.callbacks._run.steps import OptimizerSteps

BATCHES = 16
TURNS: dict[str, Callable[[int], Sequence[int]]] = {  # the optimizers that make a step, in a batch
    "both": lambda batch: (0, 1),
    "three": lambda batch: (0, 1, 2),
    "alternate": lambda batch: (batch % 2,),
    "critic": lambda batch: (0, 0, 0, 1),
    "critic by batches": lambda batch: (0, 1) if batch % 5 == 4 else (0,),
}
SCHEDULES = [Every(2), Every(3), LogSpaced(4), Warmup(1, 2)]


class Turns(SmallNet):
    """Optimizers that make steps in an order of the test's, on linear layers of their own, without a Trainer's sum."""

    def __init__(self, turns: Callable[[int], Sequence[int]], uncounted: Sequence[int] = ()) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)  # at some starts a loss is exactly 0 later on, and its step of zeros has no row
        self.net = nn.Sequential(nn.Flatten(), *(nn.Linear(64 if not i else 4, 4) for i in range(3)))
        self.turns, self.uncounted = turns, uncounted
        self.order: list[tuple[int, int]] = []  # the Trainer's sum, and the optimizer

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizers = self.optimizers()
        for i in self.uncounted:
            optimizers[i]._on_before_step = optimizers[i]._on_after_step = lambda: None
        for i in self.turns(batch_idx):
            self.order.append((self.trainer.global_step, i))
            optimizers[i].zero_grad()
            self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
            optimizers[i].step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i + 1].parameters(), lr=0.1 / (i + 1)) for i in range(3)]


def loss_of_a_batch(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(getattr(module, "net", module)(batch[0]), batch[1])


def due(order: Sequence[tuple[int, int]], schedule: Any, chosen: Sequence[int] = (0, 1, 2)) -> list[tuple[int, int]]:
    """By counting: the (sum, optimizer) of each step that a schedule samples."""
    made, found = [0, 0, 0], []
    for total, i in order:
        if schedule(made[i]) and i in chosen:
            found.append((total, i))
        made[i] += 1
    return found


def sampled(frame: pd.DataFrame) -> list[tuple[int, int]]:
    return list(zip(frame["step"].tolist(), frame["optimizer"].tolist(), strict=True))


def tails_sampled(frame: pd.DataFrame) -> list[tuple[int, int]]:
    """Of GradientTails the layers say whose step it was."""
    return sorted(
        {(step, int(layer.split(".")[1]) - 1) for step, layer in zip(frame["step"], frame["layer"], strict=True)}
    )


def fit(folder: Path, module: Turns, *callbacks: Any, **options: Any) -> dict[str, pd.DataFrame]:
    options = {"max_steps": -1, "max_epochs": 1, "limit_train_batches": BATCHES, **options}
    trainer(str(folder), callbacks=list(callbacks), **options).fit(module, loader(8 * BATCHES))
    return load_run(folder / "log") if list(folder.glob("log/*.arrows")) else {}


@pytest.mark.parametrize("turns", few(TURNS, "three", "alternate", "critic", "critic by batches"))
def test_each_optimizer_is_sampled_by_its_own_count(tmp_path: Path, turns: str) -> None:
    module, folders = Turns(TURNS[turns]), [str(tmp_path / str(i)) for i in range(len(SCHEDULES))]
    callbacks: list[Any] = []
    for schedule, folder in zip(SCHEDULES, folders, strict=True):
        callbacks.append(RelativeLoss(schedule, multiples=[1.0], loss=loss_of_a_batch, dirpath=folder))
        callbacks.append(GradientTails(schedule, of="update", dirpath=folder))
    fit(tmp_path, module, *callbacks)
    for schedule, folder in zip(SCHEDULES, folders, strict=True):
        frames, want = load_run(folder), due(module.order, schedule)
        assert {i for _, i in want} == {i for _, i in module.order}
        assert sampled(frames["relative_loss"]) == want
        assert tails_sampled(frames["gradient_tails"]) == want
        assert frames["relative_loss"]["lr"].tolist() == [0.1 / (i + 1) for _, i in want]


@pytest.mark.parametrize("uncounted", [[0], [0, 1]])
def test_steps_that_the_module_takes_out_of_the_sum_are_sampled(tmp_path: Path, uncounted: list[int]) -> None:
    module = Turns(TURNS["three"], uncounted)
    frames = fit(tmp_path, module, RelativeLoss(2, multiples=[1.0], loss=loss_of_a_batch), GradientTails(2))
    want = due(module.order, Every(2))
    assert len({total for total, _ in module.order}) < len(module.order)
    assert sampled(frames["relative_loss"]) == want
    assert tails_sampled(frames["gradient_tails"]) == want


@pytest.mark.parametrize(("chosen", "optimizers"), [(1, [1]), ([2, 0], [0, 2]), (None, [0, 1, 2])])
def test_optimizers_can_be_chosen(tmp_path: Path, chosen: Any, optimizers: list[int]) -> None:
    module = Turns(TURNS["three"])
    frames = fit(tmp_path, module, RelativeLoss(2, multiples=[1.0], loss=loss_of_a_batch, optimizer=chosen))
    assert sampled(frames["relative_loss"]) == due(module.order, Every(2), optimizers)


@pytest.mark.parametrize("chosen", [-1, True, 1.0, [], [0, "1"], "first"])
def test_an_index_is_a_whole_number_from_0(chosen: Any) -> None:
    with pytest.raises(ValueError, match="optimizer must be the index of an optimizer, from 0, or several, or None"):
        RelativeLoss(optimizer=chosen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer": 3},
            r"RelativeLoss\(optimizer=3\): there is no optimizer of this index; the indices go from 0 to 2",
        ),
        ({"optimizer": [0, 7]}, r"RelativeLoss\(optimizer=7\)"),
        (
            {"loss": [loss_of_a_batch] * 2},
            "one loss for all optimizers or one for each; 2 were given, and the number of",
        ),
    ],
)
def test_what_does_not_fit_the_optimizers_is_said_before_training(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    module = Turns(TURNS["three"])
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, RelativeLoss(**{"loss": loss_of_a_batch, **options}))
    assert module.order == []


def test_each_optimizer_may_have_a_loss_of_its_own_and_has_keys_of_its_own(tmp_path: Path) -> None:
    losses = [lambda module, batch, i=i: module.net[i + 1].weight.square().sum() for i in range(3)]
    module = Turns(TURNS["three"])
    frames = fit(tmp_path, module, RelativeLoss(1, multiples=[-1.0, 0.0, 1.0], loss=losses), limit_train_batches=2)
    record = frames["relative_loss"]
    assert sampled(record) == [(s, s % 3) for s in range(6)]
    assert len({round(loss, 3) for loss in record["loss"][:3]}) == 3
    assert all(curve[1] == 1.0 and curve[2] != 1.0 for curve in record["relative"])
    logged = pd.read_csv(tmp_path / "log" / "metrics.csv").set_index("step")
    for row in record.to_dict("records"):
        of = f"optimizer_{row['optimizer']}"
        assert logged.at[row["step"], f"relative_loss/headroom/{of}"] == pytest.approx(row["headroom"])
        assert logged.at[row["step"], f"relative_loss/at/1/{of}"] == pytest.approx(row["relative"][2])
    assert "relative_loss/headroom" not in logged


def test_every_optimizer_is_measured_on_the_batch_as_it_was_given(tmp_path: Path) -> None:
    class Spoils(Turns):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            super().training_step(batch, batch_idx)
            batch[0].zero_()

        def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            super().manual_backward(loss, *args, **kwargs)
            self.batch[0].mul_(2.0)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.batch, self.given = batch, batch[0].clone()

    seen = []

    def loss(module: Spoils, batch: Any) -> Tensor:
        seen.append(torch.equal(batch[0], module.given))
        return loss_of_a_batch(module, batch)

    module = Spoils(TURNS["critic"])
    frames = fit(tmp_path, module, RelativeLoss(3, multiples=[1.0], loss=loss))
    assert len(seen) == 2 * len(frames["relative_loss"]) > BATCHES
    assert all(seen)


def batches_due(groups: Sequence[Sequence[int]], schedule: Any) -> list[int]:
    """By counting: the steps made before each batch in which their number has reached or passed one that is due."""
    made, asked, found = 0, -1, []
    for group in groups:
        if any(map(schedule, range(asked + 1, made + 1))):
            found.append(made)
        asked, made = made, made + len(group)
    return found


@pytest.mark.parametrize("turns", ["both", "critic by batches"])
def test_batches_that_pass_over_a_sampled_step_are_sampled(tmp_path: Path, turns: str) -> None:
    """ChannelMoments follows batches: the first that starts at or after a step that is due."""
    schedules = [Every(5), LogSpaced(4), Warmup(3, 7)]
    moments = [ChannelMoments(s, sites="net.1", dirpath=str(tmp_path / str(i))) for i, s in enumerate(schedules)]
    fit(tmp_path, Turns(TURNS[turns]), *moments)
    for i, schedule in enumerate(schedules):
        steps = load_run(tmp_path / str(i))["channel_moments"]["step"].tolist()
        assert steps == batches_due([TURNS[turns](batch) for batch in range(BATCHES)], schedule)


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_goes_on_with_each_count(tmp_path: Path) -> None:
    def run(folder: Path, epochs: int, ckpt_path: Path | None = None) -> tuple[Turns, dict[str, pd.DataFrame]]:
        module = Turns(TURNS["critic by batches"])
        saves = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
        options: dict[str, Any] = {"multiples": [1.0], "loss": loss_of_a_batch}
        callbacks = [RelativeLoss(n, **options, dirpath=str(folder / str(n))) for n in (3, 5)]
        made = trainer(
            str(folder),
            callbacks=[*callbacks, GradientTails(5, dirpath=str(folder / "tails")), saves],
            logger=False,
            max_steps=-1,
            max_epochs=epochs,
            limit_train_batches=8,
            enable_checkpointing=True,
        )
        made.fit(module, loader(64), ckpt_path=ckpt_path and str(ckpt_path), weights_only=False)
        return module, {name: load_run(folder / name) for name in ("3", "5", "tails")}

    whole, expected = run(tmp_path / "whole", 3)
    first, _ = run(tmp_path / "parts", 1)
    second, found = run(tmp_path / "parts", 3, tmp_path / "parts" / "epoch=0.ckpt")
    assert [*first.order, *second.order] == whole.order
    for frames in (expected, found):
        for n in (3, 5):
            assert sampled(frames[str(n)]["relative_loss"]) == due(whole.order, Every(n))
        assert tails_sampled(frames["tails"]["gradient_tails"]) == due(whole.order, Every(5))


# The counts themselves


@given(
    st.integers(1, 3).flatmap(
        lambda n: st.tuples(
            st.just(n),
            st.lists(st.lists(st.integers(0, n - 1), max_size=5), max_size=12),
            st.sets(st.integers(0, n - 1)),
        )
    ),
    st.integers(1, 3),
)
def test_steps_are_counted_as_they_are_made(run: Any, evaluations: int) -> None:
    count, batches, uncounted = run
    optimizers = [object() for _ in range(count)]
    loop: Any = SimpleNamespace(optimizers=optimizers, step=0)
    steps, made = OptimizerSteps(), [0] * count
    if count == 1:
        uncounted = set()
    steps.start(loop)
    for batch in batches:
        for place, i in enumerate(batch):
            if place and batch[place - 1] == i in uncounted:
                continue  # not told from another evaluation of the same step
            assert steps.next(loop, i) == (i, made[i])
            assert steps.begin(loop, optimizers[i]) == (i, made[i])
            for _ in range(evaluations - 1):
                assert steps.begin(loop, optimizers[i]) is None
            made[i] += 1
            loop.step += i not in uncounted
        steps.end_batch()
    assert steps.begin(loop, object()) is None


def test_a_trainer_that_starts_anew_is_counted_anew() -> None:
    optimizers = [object(), object()]
    loop: Any = SimpleNamespace(optimizers=optimizers, step=0)
    steps = OptimizerSteps()
    for expected in (0, 0):
        loop.step = 0
        steps.start(loop)
        for i in (0, 0, 1):
            step = steps.begin(loop, optimizers[i])
            assert step is not None
            loop.step += 1
        assert steps.state_dict() == {"steps": [2 + expected, 1]}
    steps.start(loop)  # goes on
    assert steps.next(loop, 0).made == 2
    loop.step = 10  # of steps that nobody counted
    steps.start(loop)
    assert [steps.next(loop, i).made for i in (0, 1)] == [5, 5]


# Without a Trainer


def test_a_plain_loop_with_several_optimizers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    optimizers = [torch.optim.SGD(model[1].parameters(), 0.1), torch.optim.AdamW(model[3].parameters(), 0.01)]
    callbacks = [
        RelativeLoss(2, multiples=[1.0], loss=loss_of_a_batch, along="update"),
        GradientTails(2, of=["gradient", "update"]),
        ChannelMoments(2),
        Divergence(),
    ]
    order: list[tuple[int, int]] = []
    with watch(model, optimizers, *callbacks, dirpath=tmp_path) as watching:
        for batch in loader(8 * 6):
            for i in (0, 0, 1):
                loss = loss_of_a_batch(model, batch)
                if i == 0:
                    watching.batch(batch)
                    watching.loss(loss)
                optimizers[i].zero_grad()
                loss.backward()
                order.append((watching.step, i))
                optimizers[i].step()
    assert watching.step == 18
    frames = load_run(tmp_path)
    assert sampled(frames["relative_loss"]) == due(order, Every(2))
    tails = frames["gradient_tails"]
    for what in ("gradient", "update"):
        rows = tails[tails["of"] == what]
        pairs = zip(rows["step"], rows["layer"].str.split(".").str[0], strict=True)
        assert sorted({(step, {"1": 0, "3": 1}[layer]) for step, layer in pairs}) == due(order, Every(2))
    # The model is called for each step
    assert frames["channel_moments"]["step"].tolist() == batches_due([[i] for _, i in order], Every(2))
    assert frames["divergence"].empty
    assert not any(o._optimizer_step_post_hooks or o._optimizer_step_pre_hooks for o in optimizers)


@pytest.mark.parametrize("callback", [Divergence(), RelativeLoss(1, loss=loss_of_a_batch)])
def test_what_a_plain_loop_tells_holds_for_one_step_of_each_optimizer(tmp_path: Path, callback: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 4))
    optimizers = [torch.optim.SGD(layer.parameters(), 0.1) for layer in model[1:]]
    batch = next(iter(loader()))
    with watch(model, optimizers, callback, dirpath=tmp_path) as watching:
        for order in ((0, 1), (1, 0), (0,), (1,)):
            loss_of_a_batch(model, batch).backward()
            watching.batch(batch)
            watching.loss(1.0)
            for i in order:
                optimizers[i].step()
        with pytest.raises(ValueError, match=r"call watching\.(loss|batch)\((loss|batch)\) before each"):
            optimizers[1].step()
    assert watching.step == 6
