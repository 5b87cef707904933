"""What a capsule holds of the last steps, that these are made again bit for bit, and that the run does not notice."""

from __future__ import annotations

import copy
import math
import random
import runpy
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from callbacks_small import SmallNet, TwoOptimizers, images, loader, trainer
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.profilers import SimpleProfiler
from perturbation import CELLS, CellNet, assert_unperturbed, cell_id, fit, fit_cell
from sweeps import slow
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, SequentialSampler

import normzoo
from normzoo import load_run
from normzoo.callbacks import (
    ChannelMoments,
    Divergence,
    DivergenceError,
    Flag,
    GradientNorm,
    GradientTails,
    ParameterNorms,
    Raise,
    Recorder,
    RecordingBatchSampler,
    RelativeLoss,
    Rule,
    Seen,
)
from normzoo.callbacks._run import frames
from normzoo.callbacks._run.batches import HostTensor, bit_sum, host_copy
from normzoo.callbacks._run.settings import class_path, module_settings, own_class, plain, torch_settings
from normzoo.callbacks._run.streams import random_streams, set_random_streams

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
AT, EVERY, STEPS = 9, 3, 14  # the step that is called a divergence, steps between snapshots, steps of a fit


class At(Rule):
    """Flags one step, whatever its loss."""

    def __init__(self, step: int = AT) -> None:
        self.step = step

    def judge(self, seen: Seen) -> Flag | None:
        return Flag("at", 0.0) if seen.step == self.step else None


def alarm(step: int = AT, every: int = EVERY, **options: Any) -> Divergence:
    return Divergence(rules=[At(step)], recorder=Recorder(every, **options))


def small_fit(folder: Path, *callbacks: Any, data: Any = None, net: Any = None, **options: Any) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    made = trainer(str(folder), callbacks=list(callbacks), **{"max_steps": STEPS, **options})
    made.fit(SmallNet("adamw") if net is None else net(), loader() if data is None else data)
    return made


def capsule_of(folder: Path) -> normzoo.Capsule:
    return normzoo.load_capsule(folder / "log")


@pytest.mark.parametrize("cell", [*CELLS[:2], *map(slow, CELLS[2:])], ids=lambda cell: cell_id(cell))
def test_a_run_that_has_an_alarm_ends_bit_for_bit_as_without(tmp_path: Path, cell: dict[str, Any]) -> None:
    measurements = [GradientNorm(), GradientTails(7), ChannelMoments(7, sites="net*"), RelativeLoss(7), alarm()]
    plain = fit_cell(tmp_path / "plain", cell, [], max_steps=STEPS)
    measured = fit_cell(tmp_path / "measured", cell, measurements, max_steps=STEPS)
    assert_unperturbed(plain, measured)
    remade = capsule_of(tmp_path / "measured").about["remade"]
    assert (remade["why_not"], remade["first_difference"], remade["to"]) == ("", None, AT)
    assert AT - 2 * EVERY < remade["from"] <= AT - EVERY


def test_what_is_measured_at_steps_made_again_is_what_the_run_would_have_measured(tmp_path: Path) -> None:
    def without_scores(record: pd.DataFrame) -> pd.DataFrame:
        return record[[c for c in record.columns if "score" not in c]].reset_index(drop=True)

    every = [GradientTails(1), ChannelMoments(1), GradientNorm(layers=1), ParameterNorms(1), RelativeLoss(1)]
    small_fit(tmp_path / "each", *every)
    small_fit(tmp_path / "now", GradientTails(50), ChannelMoments(50), GradientNorm(), RelativeLoss(50), alarm())
    expected, capsule = load_run(tmp_path / "each" / "log"), capsule_of(tmp_path / "now")
    first = capsule.about["remade"]["from"]
    assert set(capsule.records) == {*expected}
    for name, record in capsule.records.items():
        since = AT - 1 if name == "relative_loss" else first
        of_run = expected[name][(expected[name]["step"] >= since) & (expected[name]["step"] <= AT)]
        assert len(record) > 0
        pd.testing.assert_frame_equal(without_scores(record), without_scores(of_run), check_exact=True)


class Manual(TwoOptimizers):
    """Draws from a generator of its own, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.noise, self.steps_seen = torch.Generator().manual_seed(3), 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        self.steps_seen += 1
        super().training_step([batch[0] + torch.randn(batch[0].shape, generator=self.noise)], batch_idx)
        return {"loss": batch[0].mean()}


def test_under_manual_optimization_steps_are_made_again_as_well(tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain", Manual, [], max_steps=28)
    measured = fit(tmp_path / "measured", Manual, [GradientTails(7), alarm(AT + 9)], max_steps=28)
    assert_unperturbed(plain, measured)
    capsule = capsule_of(tmp_path / "measured")
    assert capsule.about["remade"]["why_not"] == ""
    assert {*capsule.records["parameter_norms"]["optimizer"]} == {0, 1}


class StepsSchedulers(SmallNet):
    """Steps a scheduler of schedulers by hand, at every second batch, and uses what it says in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        loss = super().training_step(batch, batch_idx) * scheduler.get_last_lr()[0]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if batch_idx % 2:
            scheduler.step()
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        parts = [
            torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
        ]
        return [optimizer], [torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [4])]


def test_schedulers_that_training_step_steps_are_put_back(tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain", StepsSchedulers, [], max_steps=STEPS)
    measured = fit(tmp_path / "measured", StepsSchedulers, [alarm()], max_steps=STEPS)
    assert_unperturbed(plain, measured)
    assert capsule_of(tmp_path / "measured").about["remade"]["first_difference"] is None


class LooksAhead(torch.optim.SGD):
    """Pulls parameters towards slow ones at every fifth step, which it counts; both are its own attributes."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.steps_made = 0
        self.slow: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        fast = [p for group in self.param_groups for p in group["params"]]
        self.slow = self.slow or [p.clone() for p in fast]
        self.steps_made += 1
        for p, behind in zip(fast, self.slow, strict=True) if self.steps_made % 5 == 0 else ():
            p.copy_(behind.lerp_(p, 0.5))
        return loss


class LooksAheadNet(SmallNet):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.optimizer = LooksAhead(self.parameters())
        return self.optimizer


def test_attributes_of_an_optimizer_are_put_back(tmp_path: Path) -> None:
    plain = small_fit(tmp_path / "plain", net=LooksAheadNet)
    measured = small_fit(tmp_path / "measured", alarm(), net=LooksAheadNet)
    assert measured.optimizers[0].steps_made == STEPS  # type: ignore[attr-defined]
    for p, q in zip(*(run.lightning_module.parameters() for run in (plain, measured)), strict=True):
        assert torch.equal(p, q)
    assert capsule_of(tmp_path / "measured").about["remade"]["first_difference"] is None


class OnlyTheHead(SmallNet):
    """Its body is in no optimizer, so that gradients pile up there; they count when all are clipped."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net[6].parameters(), lr=0.1)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("norm", nn.utils.clip_grad_norm_(self.parameters(), 0.1))


class AccumulatesByHand(SmallNet):
    """The second of two optimizers makes a step at every fourth batch, with the gradients of all four."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in self.optimizers()[: 2 if batch_idx % 4 == 3 else 1]:
            optimizer.step()
            optimizer.zero_grad()
        return {"loss": loss}

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[:2], self.net[6])]


@pytest.mark.parametrize("net", [OnlyTheHead, AccumulatesByHand])
def test_gradients_from_steps_before_are_put_back(tmp_path: Path, net: Any) -> None:
    plain = fit(tmp_path / "plain", net, [], max_steps=16)
    measured = fit(tmp_path / "measured", net, [alarm(13)], max_steps=16)
    assert_unperturbed(plain, measured)
    assert capsule_of(tmp_path / "measured").about["remade"]["first_difference"] is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_buffers_of_a_scripted_module_are_put_back(tmp_path: Path) -> None:
    def scripted() -> SmallNet:
        net = SmallNet()
        net.net = torch.jit.script(net.net)
        return net

    runs = [small_fit(tmp_path / name, *c, net=scripted) for name, c in (("plain", []), ("measured", [alarm()]))]
    plain, measured = (run.lightning_module.state_dict() for run in runs)
    assert all(torch.equal(plain[name], measured[name]) for name in plain)


class Meter:
    """An object of an object, which refers to it."""

    def __init__(self, owner: Any) -> None:
        self.owner, self.count = owner, 0


class Meters:
    def __init__(self) -> None:
        self.loss, self.by_name = Meter(self), {"loss": Meter(self)}


class Metered(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.meters = Meters()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.meters.loss.count += 1
        self.meters.by_name["loss"].count += 1
        return super().training_step(batch, batch_idx)


def test_objects_that_hold_each_other_are_put_back(tmp_path: Path) -> None:
    net = small_fit(tmp_path, alarm(), net=Metered).lightning_module
    assert (net.meters.loss.count, net.meters.by_name["loss"].count) == (STEPS, STEPS)
    assert capsule_of(tmp_path).about["remade"]["why_not"] == ""


class TwoLoaders(SmallNet):
    """Draws a second batch from a loader of its own."""

    def on_fit_start(self) -> None:
        self.more = iter(loader(800))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([torch.cat(pair) for pair in zip(batch, next(self.more), strict=True)], batch_idx)


def test_a_module_that_draws_from_an_iterator_goes_on_undisturbed(tmp_path: Path) -> None:
    runs = [small_fit(tmp_path / name, *c, net=TwoLoaders) for name, c in (("plain", []), ("measured", [alarm()]))]
    plain, measured = (run.lightning_module.state_dict() for run in runs)
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
    assert "iterator, a _SingleProcessDataLoaderIter" in capsule_of(tmp_path / "measured").about["remade"]["why_not"]


class OfInputs(SmallNet):
    """Its loss has the gradient with respect to the batch, as penalties and solvers of equations do."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0].requires_grad_(), batch[1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return loss + torch.autograd.grad(loss, batch[0], create_graph=True)[0].square().sum()


def test_a_batch_that_requires_a_gradient_does_so_again(tmp_path: Path) -> None:
    small_fit(tmp_path, alarm(), net=OfInputs)
    remade = capsule_of(tmp_path).about["remade"]
    assert (remade["why_not"], remade["first_difference"]) == ("", None)


def test_a_loss_that_is_not_a_number_is_the_same_in_any_precision(tmp_path: Path) -> None:
    class NotANumber(SmallNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1]) * -math.nan

    small_fit(tmp_path, alarm(), net=NotANumber, precision="16-true")
    assert capsule_of(tmp_path).about["remade"]["first_difference"] is None


def test_measurements_of_one_class_measure_each_for_itself(tmp_path: Path) -> None:
    own = [
        ParameterNorms(5),
        GradientTails(7),
        GradientTails(5, dirpath=str(tmp_path / "tails")),
        ParameterNorms(2, label="two"),
    ]
    small_fit(tmp_path / "now", *own, alarm())
    capsule = capsule_of(tmp_path / "now")
    assert capsule.about["remade"]["why_not"] == ""
    first = capsule.about["remade"]["from"]
    apart = [load_run(capsule.path / "records" / name) for name in ("", "tails", "two")]
    assert [set(records) for records in apart] == [
        {"parameter_norms", "gradient_tails"},
        {"gradient_tails"},
        {"parameter_norms"},
    ]
    for records in apart:
        for record in records.values():
            assert [*dict.fromkeys(record["step"])] == list(range(first, AT + 1))


class Locked(GradientNorm):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_a_measurement_that_cannot_be_copied_does_not_end_the_run(tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain", CellNet, [], max_steps=STEPS)
    measured = fit(tmp_path / "measured", CellNet, [Locked(), alarm()], max_steps=STEPS)
    assert_unperturbed(plain, measured)
    assert "Locked cannot be copied" in capsule_of(tmp_path / "measured").about["remade"]["why_not"]


@pytest.mark.parametrize("strict", [False, True])
def test_a_profiler_sees_the_steps_of_the_run_alone(tmp_path: Path, strict: bool) -> None:
    profiler = SimpleProfiler()
    ends = Divergence(rules=[At()], recorder=Recorder(EVERY), action=Raise(), strict=strict)
    with pytest.raises(DivergenceError):
        small_fit(tmp_path, ends, profiler=profiler)
    steps = profiler.recorded_durations["[Strategy]SingleDeviceStrategy.training_step"]
    assert len(steps) == AT + 1 + (not strict)
    assert capsule_of(tmp_path).about["remade"]["why_not"] == ""


@pytest.mark.filterwarnings("ignore:.*[Ll]azy")
def test_parameters_of_lazy_modules_are_known_after_the_first_batch(tmp_path: Path) -> None:
    def lazy() -> SmallNet:
        net = SmallNet("adamw")
        net.net[0] = nn.LazyConv2d(8, 3, padding=1, bias=False)
        return net

    small_fit(tmp_path, alarm(2), net=lazy)
    capsule = capsule_of(tmp_path)
    remade = capsule.about["remade"]
    assert (remade["from"], remade["to"], remade["why_not"], remade["first_difference"]) == (1, 2, "", None)
    assert "net.0.weight" in capsule.state()["module"]


class Unfreezes(BaseFinetuning):
    """Trains the head, and the body with it from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[:4])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[:4], optimizer, lr=0.01)


class TrainsTheHead(SmallNet):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net[4:].parameters(), lr=0.01)


@pytest.mark.parametrize(("at", "first"), [(5, 0), (6, 6), (8, 6), (13, 6)])
def test_steps_are_made_again_from_where_parameter_groups_were_added(tmp_path: Path, at: int, first: int) -> None:
    small_fit(tmp_path, Unfreezes(), alarm(at, 6), data=loader(48), net=TrainsTheHead, max_steps=16)
    remade = capsule_of(tmp_path).about["remade"]
    assert (remade["from"], remade["to"], remade["why_not"], remade["first_difference"]) == (first, at, "", None)


class Teaches(SmallNet):
    """An average of its weights, moved at the end of a batch, is the target; the learning rate is set at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        self.optimizers().param_groups[0]["lr"] = 0.1 / (1 + self.global_step)
        return -1 if batch_idx == 7 else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), self.teacher(batch[0]))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for average, p in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            average.lerp_(p.detach(), 0.1)


def test_what_the_module_does_at_the_start_and_end_of_a_batch_is_done_again(tmp_path: Path) -> None:
    runs = [small_fit(tmp_path / name, *c, net=Teaches) for name, c in (("plain", []), ("measured", [alarm()]))]
    plain, measured = (run.lightning_module.state_dict() for run in runs)
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
    remade = capsule_of(tmp_path / "measured").about["remade"]
    assert (remade["why_not"], remade["first_difference"]) == ("", None)


class CountsNoSteps(SmallNet):
    """Makes the steps of an optimizer that Lightning does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        return {"loss": self.net(batch[0]).mean()}


def test_a_run_that_counts_no_steps_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MOST_OF_A_STEP", 5)

    class Ends(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 11:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        small_fit(tmp_path, alarm(), Ends(), net=CountsNoSteps, max_steps=-1, max_epochs=1)
    assert len(capsule_of(tmp_path).batches(0)) == 5


class HoldsAnArray(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.table = np.zeros(100_000)


def test_arrays_of_a_module_count_as_memory(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="a capsule will hold no snapshots of the run's state: they take 1.61 MB"):
        small_fit(tmp_path, alarm(max_memory=1e6), net=HoldsAnArray)
    assert capsule_of(tmp_path).about["remade"]["why_not"] == "no snapshot of the run's state was kept"


def test_batches_that_become_too_large_are_kept_no_more(tmp_path: Path) -> None:
    def longer(items: Any) -> Any:
        sizes.append(len(sizes) + 1)
        return torch.stack([x for x, _ in items]).repeat(1, 1, sizes[-1], 1), torch.tensor([y for _, y in items])

    sizes: list[int] = []
    data = DataLoader(images(160), batch_size=8, collate_fn=longer)
    with pytest.warns(UserWarning, match="in the place of the batches, which would take .* give Recorder fewer steps"):
        small_fit(tmp_path, alarm(max_memory=50_000), data=data)
    capsule = capsule_of(tmp_path)
    assert capsule.about["remade"]["why_not"] == "the batches were not kept"
    assert all(batch is None for step in capsule.frames["step"] for batch in capsule.batches(step))


class SavesInAStep(pl.Callback):
    """Saves a checkpoint between loss and update."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == AT - 1:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt")


def test_a_checkpoint_that_a_step_has_saved_stays(tmp_path: Path) -> None:
    saved = []
    for name, more in (("plain", []), ("measured", [alarm()])):
        small_fit(tmp_path / name, SavesInAStep(), *more)
        saved.append(torch.load(tmp_path / name / "saved.ckpt", weights_only=False))
    plain, measured = (checkpoint["loops"]["fit_loop"] for checkpoint in saved)
    assert plain == measured
    assert "Divergence" in saved[1]["callbacks"]


def test_a_recorder_of_two_divergences_is_refused(tmp_path: Path) -> None:
    shared = Recorder(EVERY)
    with pytest.raises(ValueError, match=r"the same Recorder; give each a Recorder\(\) of its own"):
        small_fit(tmp_path, *(Divergence(rules=[At()], recorder=shared, label=label) for label in "ab"))


def test_frames_and_tensors_are_those_of_the_run(tmp_path: Path) -> None:
    data = images(160)
    small_fit(tmp_path / "now", GradientNorm(), alarm(), data=DataLoader(data, 8))
    capsule = capsule_of(tmp_path / "now")
    steps = capsule.frames["step"].tolist()
    assert steps == list(range(steps[0], AT + 2))
    assert steps[0] <= AT - EVERY
    logged = pd.read_csv(tmp_path / "now" / "log" / "metrics.csv")
    losses = logged.set_index("step")["loss_step"].dropna()
    for step, loss in zip(capsule.frames["step"], capsule.frames["loss"], strict=True):
        if step <= AT:
            assert np.float32(loss) == np.float32(losses[step])
        (x, y), *rest = capsule.batches(step)
        assert not rest
        assert torch.equal(x, data.tensors[0][8 * step : 8 * step + 8])
        assert torch.equal(y, data.tensors[1][8 * step : 8 * step + 8])
    norms = load_run(tmp_path / "now" / "log")["gradient_norm"]
    whole = norms[norms["of"] == ""].set_index("step")["norm"]
    judged = capsule.frames[capsule.frames["step"] <= AT]
    assert judged["norm"].tolist() == whole[judged["step"]].tolist()


class WithHyperparameters(SmallNet):
    """Saves its arguments, of which one is no plain data."""

    def __init__(self, width: int, sizes: tuple[int, ...], act: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_capsule_says_how_the_run_was_set_up(tmp_path: Path) -> None:
    options = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "precision": "bf16-mixed"}
    small_fit(tmp_path, alarm(), net=lambda: WithHyperparameters(3, (1, 2), torch.relu), **options)
    settings = capsule_of(tmp_path).about["settings"]
    expected = {
        "precision": "bf16-mixed",
        "gradient_clip_val": 0.5,
        "gradient_clip_algorithm": None,
        "accumulate_grad_batches": 2,
        "accelerator": "CPUAccelerator",
        "strategy": "SingleDeviceStrategy",
        "devices": 1,
        "world_size": 1,
        "max_steps": STEPS,
        "optimizers": ["SGD"],
        "callbacks": ["normzoo.callbacks.divergence:Divergence"],
        "deterministic_algorithms": False,
        "float32_matmul_precision": "highest",
        "threads": torch.get_num_threads(),
        "flush_denormal": False,
        "device": "cpu",
        "gpu": None,
        "module": f"{__name__}:WithHyperparameters",
        "module_file": __file__,
        "hparams": {"width": 3, "sizes": (1, 2)},
        "hparams_left_out": ["act"],
        "hparams_name": "kwargs",
        "compiled": False,
    }
    assert {name: settings[name] for name in expected} == expected
    assert settings["versions"]["torch"] == torch.__version__
    assert settings["processor"]
    page = (Path(__file__).parents[2] / "docs" / "capsules.md").read_text(encoding="utf-8")
    assert [name for name in settings if f"`{name}`" not in page] == []


@given(st.recursive(PLAIN, lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside), max_leaves=9))
def test_hyperparameters_that_are_plain_data_are_kept_as_they_are(value: Any) -> None:
    assert repr(plain(value)) == repr(value)
    assert plain([value, [object()]]) is plain(object())
    assert plain({"a": value, "b": torch.ones(1)}) is plain({1: value}) is plain(object())


class Local(nn.Linear):
    """A class of an own file, from which torch derives others."""


def test_the_class_of_a_module_is_the_one_that_its_author_wrote() -> None:
    for module in (Local(2, 2), nn.utils.parametrizations.weight_norm(Local(2, 2))):
        assert class_path(own_class(module)) == f"{__name__}:Local"
    assert own_class(nn.Linear(2, 2)) is nn.Linear
    sharded = type("FSDPLocal", (FSDPModule, Local), {"__module__": FSDPModule.__module__})  # as fully_shard makes it
    assert own_class(object.__new__(sharded)) is Local
    assert own_class(type("Made", (nn.Linear,), {"__module__": __name__})(2, 2)).__name__ == "Made"  # not by torch


def test_a_class_of_python_m_has_the_path_of_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    main = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    own = type("Own", (nn.Linear,), {"__module__": "__main__"})
    main.__spec__ = None  # of a script
    assert class_path(own) == "__main__:Own"
    main.__spec__ = ModuleSpec("package.train", None)
    assert class_path(own) == "package.train:Own"
    assert class_path(Local) == f"{__name__}:Local"


OWN = "from torch import nn\nclass Own(nn.Linear):\n    def forward(self, x): return x\n"


def test_the_file_of_a_class_is_known_without_its_module(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\nclass Own(nn.Linear):\n    def forward(self, x): return x\n"
    )
    module = runpy.run_path(str(tmp_path / "own.py"))["Own"](2, 2)
    assert module_settings(module)["module_file"] == str(tmp_path / "own.py")
    made: dict[str, Any] = {}
    exec(OWN, {"__name__": "a"}, made)
    assert module_settings(made["Own"](2, 2))["module_file"] is None


def test_settings_of_torch_are_told_where_it_refuses_to_tell_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses() -> str:
        raise RuntimeError("you have used mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuses)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        said = torch_settings(torch.device("cpu"))
    finally:
        torch.set_flush_denormal(False)
        torch.use_deterministic_algorithms(False)
    names = ("float32_matmul_precision", "flush_denormal", "deterministic_algorithms", "deterministic_warn_only")
    assert [said[name] for name in names] == [None, True, True, True]


def test_a_capsule_has_the_module_as_it_is_when_it_is_written(tmp_path: Path) -> None:
    small_fit(tmp_path / "now", alarm())
    now = capsule_of(tmp_path / "now").now()
    assert now is not None
    ended = small_fit(tmp_path / "stopped", max_steps=now["step"])
    assert now["step"] == AT + 2  # read one step late, after that step
    assert {*now["module"]} == {*now["checksums"]} == {*ended.lightning_module.state_dict()}
    for name, value in ended.lightning_module.state_dict().items():
        assert torch.equal(now["module"][name], value), name
    with pytest.raises(RuntimeError, match="fails"):
        small_fit(tmp_path / "error", alarm(STEPS), net=FailsAtOnce)
    assert capsule_of(tmp_path / "error").now() is None


class FailsAtOnce(SmallNet):
    def training_step(self, batch: Any, batch_idx: int) -> Any:  # type: ignore[override]
        raise RuntimeError("fails")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_snapshot_is_the_state_of_a_run_that_ends_there(tmp_path: Path, optimizer: str) -> None:
    small_fit(tmp_path / "now", alarm(), net=lambda: SmallNet(optimizer))
    snapshot = capsule_of(tmp_path / "now").state(step=AT - AT % EVERY)
    ended = small_fit(tmp_path / "stopped", net=lambda: SmallNet(optimizer), max_steps=AT - AT % EVERY)
    for name, value in ended.lightning_module.state_dict().items():
        assert torch.equal(snapshot["module"][name], value), name
    state = ended.optimizers[0].state_dict()["state"]
    saved = snapshot["optimizers"][0]["state"]
    for index, entries in state.items():
        for key, value in entries.items():
            assert torch.equal(saved[index][key], value) if isinstance(value, Tensor) else saved[index][key] == value
    assert snapshot["trainer"]["loops"]["epoch_loop.batch_progress"]["total"]["completed"] == snapshot["step"]
    accuracy = snapshot["trainer"]["metrics"]["accuracy"]
    assert accuracy["tp"] + accuracy["fn"] == 8 * snapshot["step"]  # the samples of the epoch so far


def test_ids_and_checksums_stand_for_batches_that_take_too_much_memory(tmp_path: Path) -> None:
    data = images(160)
    sampler = RecordingBatchSampler(SequentialSampler(data), 8, drop_last=False)
    with pytest.warns(UserWarning, match="a capsule will hold the ids of their samples in the place of the batches"):
        small_fit(tmp_path / "ids", alarm(max_memory=21_000), data=DataLoader(data, batch_sampler=sampler))
    capsule = capsule_of(tmp_path / "ids")
    assert capsule.about["remade"]["why_not"] == "the batches were not kept"
    for step, ids, text in capsule.frames[["step", "ids", "hash"]].itertuples(index=False):
        assert list(ids) == list(range(8 * step, 8 * step + 8))
        both = [t[8 * step : 8 * step + 8] for t in data.tensors]
        assert text == " ".join(f"{bit_sum(t).item() % 2**64:016x}" for t in both)
    with pytest.warns(UserWarning, match="checksums of their content"):
        small_fit(tmp_path / "hashes", alarm(max_memory=21_000))
    assert capsule_of(tmp_path / "hashes").frames["ids"].isna().all()


def test_snapshots_that_take_too_much_memory_are_left_out_and_it_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="a capsule will hold no snapshots of the run's state: they would take about"):
        small_fit(tmp_path, alarm(max_memory=14_000))
    capsule = capsule_of(tmp_path)
    assert capsule.about["remade"]["why_not"] == "no snapshot of the run's state was kept"
    assert len(capsule.frames) == min(2 * EVERY, AT + 2)


def test_after_the_time_that_was_given_the_rest_is_left_out(tmp_path: Path) -> None:
    small_fit(tmp_path / "a", alarm(seconds=1e-9))
    remade = capsule_of(tmp_path / "a").about["remade"]
    assert remade["from"] == remade["to"] == AT - AT % EVERY  # the newest snapshot, and one step
    small_fit(tmp_path / "b", alarm(seconds=None))
    assert "seconds=None" in capsule_of(tmp_path / "b").about["remade"]["why_not"]


class FailsAgain(CellNet):
    """Its training step raises an error when a step is made that was made before."""

    most = -1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        step = self.trainer.global_step
        if step < FailsAgain.most:
            raise RuntimeError("once is enough")
        FailsAgain.most = step
        return super().training_step(batch, batch_idx)


def test_an_error_in_a_step_made_again_is_recorded_and_the_run_goes_on(tmp_path: Path) -> None:
    FailsAgain.most = -1
    plain = fit(tmp_path / "plain", CellNet, [], max_steps=STEPS)
    measured = fit(tmp_path / "measured", FailsAgain, [GradientTails(7), alarm()], max_steps=STEPS)
    assert_unperturbed(plain, measured)
    assert capsule_of(tmp_path / "measured").about["remade"]["why_not"] == "RuntimeError: once is enough"


class ClipsInAHook(pl.Callback):
    """Halves gradients, which a step made again has to go through as well, and counts."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps.append(trainer.global_step)
        for p in pl_module.parameters():
            p.grad.mul_(0.5)


def test_hooks_of_other_callbacks_take_part_and_do_not_remember_it(tmp_path: Path) -> None:
    clips = ClipsInAHook()
    small_fit(tmp_path, clips, alarm())
    assert clips.steps == list(range(STEPS))
    assert capsule_of(tmp_path).about["remade"]["first_difference"] is None


def test_a_step_that_does_not_repeat_is_named(tmp_path: Path) -> None:
    class Entropy(SmallNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss + int.from_bytes(random.SystemRandom().randbytes(2)) if self.global_step == AT - 1 else loss

    small_fit(tmp_path, alarm(), net=lambda: Entropy("adamw"))
    assert capsule_of(tmp_path).about["remade"]["first_difference"] == AT - 1


def test_an_error_of_the_run_leaves_a_capsule_and_ctrl_c_does_not(tmp_path: Path) -> None:
    class Fails(pl.Callback):
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == AT:
                raise self.error

    with pytest.raises(ZeroDivisionError, match="on purpose"):
        small_fit(tmp_path / "error", alarm(10**6), Fails(ZeroDivisionError("on purpose")))
    capsule = capsule_of(tmp_path / "error")
    assert (capsule.about["kind"], capsule.about["step"]) == ("exception", AT)
    assert capsule.about["error"] == "ZeroDivisionError: on purpose"
    assert capsule.about["sentence"] == f"the run failed at step {AT}: ZeroDivisionError: on purpose"
    assert capsule.frames["step"].tolist()[-1] == AT
    assert len(capsule.batches(AT)) == 1
    with pytest.raises(SystemExit):
        small_fit(tmp_path / "interrupt", alarm(10**6), Fails(KeyboardInterrupt()))
    with pytest.raises(FileNotFoundError, match="no capsule"):
        capsule_of(tmp_path / "interrupt")


def test_no_batch_outlives_a_run_that_was_cut_short(tmp_path: Path) -> None:
    class Fails(SmallNet):
        def on_after_backward(self) -> None:
            raise ZeroDivisionError

    divergence = alarm()
    with pytest.raises(ZeroDivisionError):
        small_fit(tmp_path, divergence, net=Fails)
    assert not any(isinstance(value, frames.MicroBatch) for value in vars(divergence).values())


def test_a_plain_loop_leaves_frames_and_the_batches_that_it_told(tmp_path: Path) -> None:
    net = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    xs = torch.randn(STEPS, 4, 3)
    with normzoo.watch(net, optimizer, GradientNorm(), alarm(), dirpath=tmp_path) as watching:
        for x in xs:
            watching.batch(x)
            loss = net(x).square().mean()
            watching.loss(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    capsule = normzoo.load_capsule(tmp_path)
    assert capsule.frames["step"].iloc[-1] in (AT, AT + 1)
    assert torch.equal(capsule.batches(AT)[0], xs[AT])
    assert "plain loop" in capsule.about["remade"]["why_not"]


def test_random_streams_go_on_from_where_they_were_saved() -> None:
    def drawn() -> tuple[float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random()

    streams = random_streams(torch.device("cpu"))
    before = drawn()
    assert drawn() != before
    set_random_streams(streams, torch.device("cpu"))
    assert drawn() == before


@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.integers(0, 19), st.integers(0, 31))
def test_a_checksum_changes_with_each_bit_and_not_with_the_order(values: list[float], at: int, bit: int) -> None:
    x = torch.tensor(values)
    flipped = x.clone()
    flipped.view(torch.int32)[at % len(x)] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    assert bit_sum(x) == bit_sum(x.flip(0)) != bit_sum(flipped)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float64, torch.complex64])
def test_any_tensor_has_a_checksum(dtype: torch.dtype) -> None:
    x = torch.ones(3, 2).to(dtype)
    assert bit_sum(x.T) == bit_sum(x) != bit_sum(torch.zeros(3, 2).to(dtype))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_tensor_of_another_layout_has_the_checksum_of_its_values() -> None:
    values = torch.randn(3, dtype=torch.complex64)
    assert bit_sum(values.conj()) == bit_sum(values.conj().resolve_conj())
    assert bit_sum(values.conj().imag) == bit_sum(-values.imag)
    for layout in (torch.jagged, torch.strided):
        assert bit_sum(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)) == bit_sum(
            torch.ones(5)
        )


def test_a_batch_is_copied_whatever_its_containers() -> None:
    x = torch.arange(4.0)
    batch = {"x": [x, (x, "text")], "n": 3, "array": np.ones(2)}
    copied = host_copy(batch)
    x.zero_()
    assert isinstance(copied["x"][0], HostTensor)
    assert copied["x"][0].back().tolist() == [0.0, 1.0, 2.0, 3.0]
    assert copied["x"][1][1] == "text"
    assert copied["n"] == 3
    assert copied["array"] is not batch["array"]
    assert host_copy([object()]) is None
    sparse = host_copy(torch.eye(3).to_sparse()).back()
    assert torch.equal(sparse.to_dense(), torch.eye(3))


@dataclass(frozen=True)
class FrozenBatch:
    x: Tensor
    y: Tensor

    def to(self, *args: Any, **options: Any) -> FrozenBatch:
        return FrozenBatch(self.x.to(*args, **options), self.y.to(*args, **options))


class BatchOfSize(Mapping[str, Any]):
    """Is made from more than what it holds."""

    def __init__(self, tensors: dict[str, Any], size: int) -> None:
        self.tensors, self.size = tensors, size

    def __getitem__(self, name: str) -> Any:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def to(self, *args: Any, **options: Any) -> BatchOfSize:
        return self


@pytest.mark.parametrize(
    ("made", "read", "again"),
    [
        (
            lambda x, y: (x.flatten(1).to_sparse(), y),
            lambda batch: (batch[0].to_dense().view(-1, 1, 8, 8), batch[1]),
            True,
        ),
        (FrozenBatch, lambda batch: (batch.x, batch.y), False),
        (lambda x, y: BatchOfSize({"x": x, "y": y}, len(x)), lambda batch: batch.values(), False),
    ],
    ids=["sparse", "frozen", "mapping"],
)
@pytest.mark.filterwarnings("ignore:a capsule will hold checksums")
def test_a_batch_of_any_class_can_be_trained_on(tmp_path: Path, made: Any, read: Any, again: bool) -> None:
    class Reads(SmallNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = read(batch)
            return F.cross_entropy(self.net(x), y)

    def collate(items: Any) -> Any:
        return made(*map(torch.stack, zip(*items, strict=True)))

    small_fit(tmp_path, alarm(), data=DataLoader(images(160), batch_size=8, collate_fn=collate), net=Reads)
    assert (capsule_of(tmp_path).about["remade"]["why_not"] == "") == again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"max_memory": -1}, "max_memory must be a number above 0, not -1"),
        ({"max_disk": None}, "max_disk must be a number above 0, not None"),
        ({"most": 1}, "most must be a whole number of at least 2, not 1"),
        ({"seconds": "1"}, "seconds must be a number above 0, not '1'"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recorder(**options)


class Often(Rule):
    """Flags each 60th step, so that each flag is an alarm."""

    def judge(self, seen: Seen) -> Flag | None:
        return Flag("often", 0.0) if seen.step % 60 == 2 else None


@pytest.mark.slow
def test_of_many_alarms_the_first_capsule_and_the_latest_stay(tmp_path: Path) -> None:
    divergence = Divergence(rules=[Often()], recorder=Recorder(2, most=3))
    small_fit(tmp_path, divergence, max_steps=250)
    assert load_run(tmp_path / "log")["divergence"]["step"].tolist() == [2, 62, 122, 182, 242]
    names = [path.name for path in sorted((tmp_path / "log" / "capsules").iterdir())]
    assert names == ["000_step_00000002", "003_step_00000182", "004_step_00000242"]
