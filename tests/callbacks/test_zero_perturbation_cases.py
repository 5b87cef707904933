"""With every callback on, a run is bit for bit the run without: what users do beside a plain fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callbacks_small import images, loader, trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from perturbation import STEPS, CellNet, assert_sampled, assert_unperturbed, every_callback, fit, snapshot
from perturbation_modules import (
    Adversarial,
    Augmented,
    Averaged,
    Batches,
    CompilableNet,
    FindableNet,
    InPlace,
    KeepingNet,
    Memory,
    MetricsNet,
    OptimizedNet,
    PenalizedNet,
    ReparametrizedNet,
    Resumable,
    SkippingNet,
    SmallGAN,
    ValidatedNet,
    gan_loss_of_a_batch,
)
from sweeps import cells, slow
from torch.utils.data import DataLoader

from normzoo import load_run

STEPPED = list(range(STEPS))


def compare(
    folder: Path,
    make: Callable[[], pl.LightningModule],
    ours: list[Any] | None = None,
    steps: list[int] | None = STEPPED,
    theirs: Callable[[], list[Any]] = list,
    **options: Any,
) -> dict[str, Any]:
    """Fit with callbacks of the user's own and without ours, and with ours; what both left."""
    accumulates = options.get("accumulate_grad_batches", 1) > 1
    ours = every_callback(several=accumulates) if ours is None else ours
    without = fit(folder / "a", make, theirs(), **options)
    with_all = fit(folder / "b", make, [*ours[:2], *theirs(), *ours[2:]], **options)
    assert_unperturbed(without, with_all)
    if steps is not None:
        assert_sampled(folder / "b", ours, steps)
    return without


@pytest.mark.parametrize(
    ("toggle", "precision"),
    cells([False, True], ["32-true", "bf16-mixed"], fast=[(True, "bf16-mixed")]),
)
def test_a_gan_under_manual_optimization(tmp_path: Path, toggle: bool, precision: str) -> None:
    ours = every_callback(several=False, loss=gan_loss_of_a_batch)
    left = compare(tmp_path, lambda: SmallGAN(toggle), ours, None, max_steps=12, precision=precision)
    assert left["steps"][0] == 12
    assert len(left["optimizer state"]) == 2
    record = load_run(tmp_path / "b" / "log")
    for quantity in ("gradient_tails", "relative_loss"):
        assert sorted(set(record[quantity]["step"])) == list(range(12)), quantity
    assert sorted(set(record["channel_moments"]["step"])) == list(range(0, 12, 2))


def test_metrics_with_state_in_the_training_step(tmp_path: Path) -> None:
    left = compare(tmp_path, MetricsNet, accumulate_grad_batches=2)
    assert {"MulticlassF1Score", "loss_mean_epoch", "loss_mean_step", "area"} <= left["logged metrics"].keys()


@pytest.mark.parametrize("accumulation", [slow(1), 2])
def test_state_of_every_kind(tmp_path: Path, accumulation: int) -> None:
    compare(tmp_path, KeepingNet, accumulate_grad_batches=accumulation)


def test_reparametrized_tied_frozen_recurrent_and_checkpointed_layers(tmp_path: Path) -> None:
    ours = every_callback(several=True)
    ours[3].patterns = ["first", "again", "tied", "frozen"]
    compare(tmp_path, ReparametrizedNet, ours, accumulate_grad_batches=2)


@pytest.mark.parametrize("persistent", [slow(False), True])
def test_a_loader_with_workers_that_augment(tmp_path: Path, persistent: bool) -> None:
    def data() -> DataLoader:
        return DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=2, persistent_workers=persistent)

    compare(tmp_path, CellNet, data=data, log_every_n_steps=1)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("layer", "stop"),  # 12 is between epochs
    cells(["dropout", "batch"], [9, 12], fast=[("dropout", 9)]),
)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path: Path, layer: str, stop: int) -> None:
    def part(name: str, ours: list[Any], steps: int, ckpt_path: Path | None = None) -> dict[str, Any]:
        saving = ModelCheckpoint(tmp_path / name / "saved", every_n_train_steps=3, save_top_k=-1, filename="{step}")
        options = {"max_steps": steps, "enable_checkpointing": True, "ckpt_path": ckpt_path and str(ckpt_path)}
        return fit(tmp_path / name, lambda: Resumable("sgd", layer), [*ours, saving], Batches, **options)

    whole = part("whole", [], 24)
    part("first", every_callback(several=False), stop + 1)
    resumed = part("second", every_callback(several=False), 24, tmp_path / "first" / "saved" / f"step={stop}.ckpt")
    assert_unperturbed(whole, resumed)
    assert_sampled(tmp_path / "second", every_callback(several=False)[:2], list(range(stop, 24)))


def test_the_learning_rate_finder(tmp_path: Path) -> None:
    def find(name: str, ours: list[Any]) -> tuple[dict[str, Any], Any, list[str], dict[str, Any]]:
        pl.seed_everything(3, verbose=False)
        module = FindableNet()
        run = trainer(str(tmp_path / name), callbacks=ours, max_steps=STEPS)
        found = Tuner(run).lr_find(module, loader(), num_training=15, min_lr=1e-4)
        after_search = snapshot(run, module)
        written = [p.name for p in (tmp_path / name).rglob("*.arrows")]
        run.fit(module, loader())
        return after_search, (found.results, found.suggestion(), module.lr), written, snapshot(run, module)

    ours = every_callback(several=False)
    without, with_all = find("a", []), find("b", ours)
    assert_unperturbed(without[0], with_all[0])
    assert without[1] == with_all[1]
    assert without[1][1] not in (None, 0.1)
    assert with_all[2] == []  # its steps, at learning rates of its own, are on no record
    assert_unperturbed(without[3], with_all[3])
    assert_sampled(tmp_path / "b", ours, STEPPED, losses=STEPS)
    assert load_run(tmp_path / "b" / "log")["relative_loss"]["lr"].unique().tolist() == [without[1][1]]


@pytest.mark.slow
def test_the_learning_rate_finder_as_a_callback(tmp_path: Path) -> None:
    theirs = lambda: [LearningRateFinder(num_training_steps=12, min_lr=1e-4)]  # noqa: E731
    compare(tmp_path, FindableNet, theirs=theirs, data=loader)


@pytest.mark.slow
def test_the_learning_rate_finder_between_epochs(tmp_path: Path) -> None:
    class Again(LearningRateFinder):
        def on_fit_start(self, *args: Any) -> None:
            """Not yet."""

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    theirs = lambda: [Again(num_training_steps=12, min_lr=1e-4)]  # noqa: E731
    compare(tmp_path, FindableNet, theirs=theirs, data=loader, max_steps=25, steps=list(range(25)))


@pytest.mark.slow
def test_validate_test_and_predict(tmp_path: Path) -> None:
    def evaluate(name: str, ours: list[Any]) -> Any:
        pl.seed_everything(3, verbose=False)
        module = ValidatedNet()
        run = trainer(str(tmp_path / name), callbacks=ours)
        left = [run.validate(module, loader(), verbose=False), run.test(module, loader(), verbose=False)]
        left += [run.predict(module, loader()), snapshot(run, module)]
        assert not list((tmp_path / name).rglob("*.arrows"))
        run.fit(module, loader(), loader(16))
        left += [snapshot(run, module), run.validate(module, loader(), verbose=False), snapshot(run, module)]
        return left

    ours = every_callback(several=False)
    assert_unperturbed(evaluate("a", []), evaluate("b", ours))
    assert_sampled(tmp_path / "b", ours, list(range(20)))


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"fast_dev_run": 3}, 3),
        ({"accumulate_grad_batches": 4}, STEPS),  # with a short last step in each epoch
        slow({"num_sanity_val_steps": 2, "val_check_interval": 2}, STEPS),
        slow({"detect_anomaly": True}, STEPS),
        slow({"precision": "bf16-true"}, STEPS),
        slow({"logger": False}, STEPS),
        slow({"overfit_batches": 2}, STEPS),
        slow({"inference_mode": False}, STEPS),
        slow({"limit_train_batches": 2}, STEPS),
        slow({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, STEPS),
        slow({"precision": "64-true"}, STEPS),
        slow({"reload_dataloaders_every_n_epochs": 1}, STEPS),
        slow({"max_time": {"minutes": 5}, "deterministic": True}, STEPS),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_of_the_trainer(tmp_path: Path, options: dict[str, Any], steps: int) -> None:
    class Net(ValidatedNet):
        def val_dataloader(self) -> DataLoader:
            return loader(16)

    in_order = lambda: DataLoader(images(24), batch_size=4)  # noqa: E731
    left = compare(tmp_path, Net, steps=None, data=in_order, **options)
    assert left["steps"][0] == steps
    if "fast_dev_run" not in options:
        there = "b" if "logger" in options else "b/log"
        assert sorted(set(load_run(tmp_path / there)["gradient_tails"]["step"])) == list(range(steps))


@pytest.mark.slow
def test_a_bare_trainer(tmp_path: Path) -> None:
    class Silent(CellNet):
        def log(self, *args: Any, **kwargs: Any) -> None:
            """Would raise a warning here."""

    bare = {"logger": None, "log_every_n_steps": None}
    left = compare(tmp_path, Silent, steps=None, barebones=True, **bare)
    assert left["logged metrics"] == {}
    assert sorted(set(load_run(tmp_path / "b")["relative_loss"]["step"])) == STEPPED


def test_a_logger_of_the_users_own_gets_the_same(tmp_path: Path) -> None:
    without, with_all = Memory(), Memory()
    fit(tmp_path / "a", CellNet, [], logger=without)
    fit(tmp_path / "b", CellNet, every_callback(several=False), logger=with_all)
    quantities = (
        "gradient_tails",
        "gradient",
        "relative_loss",
        "channel_moments",
        "channel_input",
        "channel_output",
        "gradient_noise",
    )
    of_ours = [entry for entry in with_all.seen if all(k.split("/")[0] in quantities for k in entry[0])]
    assert [entry for entry in with_all.seen if entry not in of_ours] == without.seen
    for quantity in quantities:
        assert [step for metrics, step in of_ours if f"{quantity}/" in "".join(metrics)] == STEPPED, quantity


def averages() -> Iterator[Any]:
    yield slow("swa", lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)])
    yield "ema", lambda: [EMAWeightAveraging(decay=0.9, update_every_n_steps=2)]
    yield slow("both in turn", lambda: [EMAWeightAveraging(decay=0.5), ModelCheckpoint(every_n_train_steps=4)])


@pytest.mark.parametrize(("name", "theirs"), averages())
@pytest.mark.parametrize("accumulation", [slow(1), 3])
def test_averages_of_weights(tmp_path: Path, name: str, theirs: Any, accumulation: int) -> None:
    class Net(ValidatedNet):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def val_dataloader(self) -> DataLoader:
            return loader(16)

    options = {"max_steps": -1, "max_epochs": 4, "accumulate_grad_batches": accumulation}
    ours = every_callback(several=accumulation > 1)
    compare(tmp_path, Net, ours, None, theirs=theirs, enable_checkpointing="turn" in name, **options)
    if name != "swa":  # which makes a last step after an epoch that only estimates running statistics
        assert_sampled(tmp_path / "b", ours, list(range(24 // accumulation)))


def test_checkpoints_hold_the_same(tmp_path: Path) -> None:
    def theirs() -> list[Any]:
        return [ModelCheckpoint(next(folders), every_n_train_steps=2, save_top_k=-1, save_last=True)]

    folders = itertools.chain([tmp_path / "ca", tmp_path / "cb"])
    compare(tmp_path, CellNet, theirs=theirs, enable_checkpointing=True, accumulate_grad_batches=2)
    names = sorted(p.name for p in (tmp_path / "ca").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "cb").iterdir())
    for name in names:
        without, with_all = (torch.load(tmp_path / f / name, weights_only=False) for f in ("ca", "cb"))
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            assert_unperturbed(without[key], with_all[key])


@pytest.mark.parametrize("name", ["lbfgs", *map(slow, ("groups", "fused", "plateau", "cycle"))])
def test_optimizers(tmp_path: Path, name: str) -> None:
    left = compare(tmp_path, lambda: OptimizedNet(name), max_steps=14, steps=list(range(14)))
    record = load_run(tmp_path / "b" / "log")
    assert record["relative_loss"]["step"].tolist() == list(range(14))
    if name == "plateau":
        assert left["optimizer state"][0]["param_groups"][0]["lr"] < 0.1


def test_a_step_of_several_evaluations_is_one_sample(tmp_path: Path) -> None:
    """LBFGS calls the hook before an optimizer's step for each of them."""
    fit(tmp_path, lambda: OptimizedNet("lbfgs"), every_callback(several=True), accumulate_grad_batches=2)
    for quantity, rows in load_run(tmp_path / "log").items():
        names = [c for c in ("step", "layer", "where", "of") if c in rows]
        assert not rows.duplicated(names).any(), quantity


def test_a_grad_scaler_that_skips_steps(tmp_path: Path) -> None:
    def plugin() -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=3))

    ours = every_callback(several=True)
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    without = fit(tmp_path / "a", FindableNet, [], plugins=[plugin()], **options)
    with_all = fit(tmp_path / "b", FindableNet, ours, plugins=[plugin()], **options)
    assert_unperturbed(without, with_all)
    assert_sampled(tmp_path / "b", [ours[0]], STEPPED)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("accumulation", [slow(1), 2])
def test_batches_without_a_loss_and_epochs_left_early(tmp_path: Path, accumulation: int) -> None:
    left = compare(tmp_path, SkippingNet, steps=None, max_steps=12, accumulate_grad_batches=accumulation)
    assert left["steps"][0] == 12


def test_a_step_that_differentiates(tmp_path: Path) -> None:
    compare(tmp_path, PenalizedNet)


@pytest.mark.slow
def test_callbacks_that_change_the_network(tmp_path: Path) -> None:
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.net[0])

        def finetune_function(self, module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=0.01)

    class Net(CellNet):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

    def pruning() -> list[Any]:
        return [ModelPruning("l1_unstructured", amount=0.3, use_lottery_ticket_hypothesis=False)]

    compare(tmp_path / "unfrozen", Net, theirs=lambda: [Unfreeze()])
    compare(tmp_path / "pruned", Net, theirs=pruning)
    left = compare(tmp_path / "accumulated", Net, theirs=lambda: [GradientAccumulationScheduler({0: 1, 1: 3})])
    assert left["steps"] == (STEPS, 2, 11)


@pytest.mark.slow
def test_the_batch_size_finder(tmp_path: Path) -> None:
    def scale(name: str, ours: list[Any]) -> Any:
        pl.seed_everything(3, verbose=False)
        module = FindableNet()
        module.batch_size = 2
        module.train_dataloader = lambda: loader(64, module.batch_size)
        run = trainer(str(tmp_path / name), callbacks=ours, max_steps=STEPS)
        size = Tuner(run).scale_batch_size(module, max_trials=3, steps_per_trial=2)
        assert not list((tmp_path / name).rglob("*.arrows"))
        run.fit(module)
        return size, snapshot(run, module)

    ours = every_callback(several=False)
    assert_unperturbed(scale("a", []), scale("b", ours))
    assert_sampled(tmp_path / "b", ours, STEPPED)


@pytest.mark.parametrize(
    ("net", "compiled"), cells([Adversarial, Averaged], [False, True], fast=[(Adversarial, True), (Averaged, False)])
)
def test_a_step_that_leaves_gradients_on_its_batch_or_moves_an_average(
    tmp_path: Path, net: type[CellNet], compiled: bool
) -> None:
    def make() -> pl.LightningModule:
        module = net()
        if compiled:
            module.net.compile(backend="eager")
        return module

    compare(tmp_path, make)


@pytest.mark.slow
def test_a_step_that_takes_its_batch_apart(tmp_path: Path) -> None:
    def data() -> DataLoader:
        return DataLoader([{"x": x, "y": y} for x, y in images(24)], batch_size=4)

    left = compare(tmp_path, InPlace, data=data)
    # Measured on the batch as the step was given it
    measured = load_run(tmp_path / "b" / "log")["relative_loss"]["loss"]
    assert measured.tolist() == pytest.approx(left["plain attributes"][""]["losses"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_module(tmp_path: Path, backend: str) -> None:
    def compiled() -> pl.LightningModule:
        torch._dynamo.reset()
        net = CellNet()
        net.net.compile(backend=backend)
        return net

    compare(tmp_path, compiled, every_callback(several=True), accumulate_grad_batches=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at all of a tensor's
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_module_compiled_as_a_whole(tmp_path: Path, backend: str) -> None:
    def run_compiled(name: str, ours: list[Any]) -> dict[str, Any]:
        torch._dynamo.reset()
        pl.seed_everything(3, verbose=False)
        net = CompilableNet()
        run = trainer(str(tmp_path / name), callbacks=ours, max_steps=STEPS, accumulate_grad_batches=2)
        run.fit(torch.compile(net, backend=backend), loader(48, 4))
        return snapshot(run, net)

    ours = every_callback(several=True)
    without, with_all = run_compiled("a", []), run_compiled("b", ours)
    for left in (without, with_all):
        left["plain attributes"][""].pop("_compiler_ctx", None)
    assert_unperturbed(without, with_all)
    assert_sampled(tmp_path / "b", ours, STEPPED)
