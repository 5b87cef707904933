"""What RelativeLoss leaves behind: nothing, whatever a training step touches."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from callbacks_small import SmallNet, loader, trainer
from lightning.pytorch.loggers.logger import Logger
from sweeps import cells, slow
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision

from normzoo import load_run
from normzoo.callbacks import RelativeLoss
from normzoo.callbacks._run.isolation import Snapshot, own_random_streams

ALONG = ("gradient", "update")


@dataclass
class Seen:
    losses: list[float] = field(default_factory=list)
    calls: int = 0


@dataclass(frozen=True, slots=True)
class Slotted:
    values: list[float]


class Meter:
    """The running average that many training scripts have."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0


class Listens(Logger):
    """Writes down what it is told, directly or as ``experiment``."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Any] = []

    name, version, experiment = "listens", 0, property(lambda self: self)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.heard += [(step, k, v) for k, v in metrics.items() if not k.startswith("relative_loss/")]

    def add_scalar(self, *args: Any) -> None:
        self.heard.append(args)


class Hoarder(SmallNet):
    """Changes something of each kind in every training step."""

    def __init__(self) -> None:
        super().__init__("adamw")
        self.history: dict[str, Any] = {"loss": [], "deep": {"deeper": ([[]], "constant")}}
        self.counted, self.ordered, self.grouped = Counter[str](), OrderedDict[int, int](), defaultdict[int, list](list)
        self.recent, self.names = deque[float](maxlen=3), set[int]()
        self.seen_class, self.slotted, self.meter = Seen(), Slotted([]), Meter()
        self.array, self.tensors = np.zeros(3), [torch.zeros(2)]
        self.expanded, self.last = torch.ones(1).expand(5), torch.zeros(())
        self.torch_generator = torch.Generator().manual_seed(1)
        self.generators = {"numpy": np.random.default_rng(1), "old": np.random.RandomState(1), "py": random.Random(1)}
        metrics = {"a": MulticlassAccuracy(4), "p": MulticlassPrecision(4)}
        self.collection = MetricCollection(metrics, compute_groups=[["a", "p"]])
        self.listed = [MeanMetric()]
        self.register_buffer("rebound", torch.zeros(2))
        self.momentum_encoder = copy.deepcopy(self.net).requires_grad_(False)
        self.hidden = [copy.deepcopy(self.net)]  # not registered, as averages often are
        self.largest = 0.0
        with torch.inference_mode():
            self.inferred = torch.ones(2)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        x.add_(0.01)
        logits = self.net(x) + 0.01 * torch.rand(4) * random.random() * np.random.rand()
        logits = logits + 0.01 * torch.rand(4, generator=self.torch_generator)
        logits = logits + 0.01 * sum(g.random() for g in (self.generators["numpy"], self.generators["py"]))
        logits = logits + 0.01 * self.generators["old"].rand()
        self.hidden[0](x)
        loss = F.cross_entropy(logits, y)
        value = loss.item()
        self.history["loss"].append(value)
        self.history["deep"]["deeper"][0][0].append(value)
        self.counted["calls"] += 1
        self.ordered[len(self.ordered)] = 1
        self.grouped[batch_idx].append(value)
        self.recent.append(value)
        self.names.add(len(self.names))
        self.seen_class.losses.append(value)
        self.seen_class.calls += 1
        self.slotted.values.append(value)
        self.meter.sum, self.meter.count = self.meter.sum + value, self.meter.count + 1
        self.array += value
        self.tensors[0] += value
        self.tensors.append(torch.ones(1) * value)
        self.last = logits  # with its graph
        self.rebound = self.rebound + 1
        self.listed[0].update(loss.detach())
        self.collection(logits, y)
        with torch.no_grad():
            for average, p in zip(self.momentum_encoder.parameters(), self.net.parameters(), strict=True):
                average.data = 0.9 * average.data + 0.1 * p.data
        for module in self.hidden[0].modules():
            module.training = not module.training
        self.new_attribute = value
        self.log("loss", loss)
        self.log_dict({"twice": 2 * value, "again": value}, on_epoch=True)
        self.log_dict(self.collection, on_step=False, on_epoch=True)
        self.logger.experiment.add_scalar("direct", value, self.global_step)
        self.logger.log_metrics({"by hand": value}, self.global_step)
        self.print(value)
        if value > 8:  # only where a multiple is large
            self.trainer.should_stop = True
            self.net[6].weight.grad = None
            self.net[6].bias.requires_grad_(False)
        self.largest = max(self.largest, value)
        return loss


def plain(value: Any) -> Any:
    """A value as nested tuples that compare."""
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), value.detach().double().flatten().tolist())
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Generator):
        return plain(value.get_state())
    if isinstance(value, np.random.Generator | np.random.RandomState | random.Random):
        return plain(copy.deepcopy(value).random())
    if isinstance(value, nn.Module):
        kept = {k: v for k, v in vars(value).items() if not callable(v) and k not in ("_trainer", "_jit_internal")}
        flags = [p.requires_grad for p in value.parameters(recurse=False)]
        return (type(value).__name__, plain(kept), flags)
    if isinstance(value, dict):
        return (type(value).__name__, [(repr(k), plain(v)) for k, v in value.items()])
    if isinstance(value, list | tuple | set | deque):
        return [plain(v) for v in value]
    if isinstance(value, Slotted):
        return plain(value.values)
    if type(value).__module__ == __name__:
        return plain(vars(value))
    return value if isinstance(value, int | float | str | None) else type(value).__name__


def fit(folder: Path, callbacks: list[Any], module: pl.LightningModule | None = None, **options: Any) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    module, heard = module or Hoarder(), Listens()
    batches: list[Tensor] = []

    class Watches(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            batches.append(batch[0].clone())

    watches = Watches()
    run = trainer(str(folder), callbacks=[watches, *callbacks], logger=heard, max_steps=8, **options)
    run.fit(module, loader())
    return {
        "module": plain(module),
        "optimizer": plain(run.optimizers[0].state_dict()),
        "logged": plain(dict(run.callback_metrics)),
        "heard": heard.heard,
        "batches": plain(batches),
        "draws": (torch.rand(2).tolist(), random.random(), np.random.rand()),
        "steps": run.global_step,
    }


CLIPPED = {"precision": "bf16-mixed", "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}


@pytest.mark.parametrize(
    ("along", "options"),
    [("gradient", CLIPPED), ("update", {}), slow("gradient", {}), slow("update", CLIPPED)],
    ids=lambda value: value if isinstance(value, str) else "bf16, clipped, accumulated" if value else "plain",
)
def test_a_hoarder_is_left_as_it_was(
    tmp_path: Path, along: str, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    without = fit(tmp_path / "a", [], **options)
    printed = capsys.readouterr().out
    measured = RelativeLoss(1, along=along, multiples=(-1, 0, 1, 2, 4096), dirpath=str(tmp_path / "record"))
    with_it = fit(tmp_path / "b", [measured], **options)
    for name, value in without.items():
        assert value == with_it[name], name
    assert printed == capsys.readouterr().out
    rows = load_run(tmp_path / "record")["relative_loss"]
    assert len(rows) == 8
    assert max(r[-1] * loss for r, loss in zip(rows["relative"], rows["loss"], strict=True)) > 8  # would have stopped


PAIRS = [  # each two values of two axes are in one of them
    ("gradient", "sgd", "32-true"),
    ("update", "adamw", "32-true"),
    ("update", "sgd", "bf16-mixed"),
    ("gradient", "adamw", "bf16-mixed"),
    ("gradient", "sgd", "bf16-true"),
    ("update", "adamw", "bf16-true"),
]


@pytest.mark.parametrize(
    ("along", "optimizer", "precision"),
    cells(ALONG, ["sgd", "adamw"], ["32-true", "bf16-mixed", "bf16-true"], fast=PAIRS),
)
def test_a_run_is_the_same_with_it(tmp_path: Path, along: str, optimizer: str, precision: str) -> None:
    states = []
    for name, callbacks in (("a", []), ("b", [RelativeLoss(1, multiples=[-1, 0.5, 4], along=along)])):
        pl.seed_everything(3, verbose=False)
        module = SmallNet(optimizer)
        run = trainer(str(tmp_path / name), callbacks=callbacks, max_steps=8, precision=precision)
        run.fit(module, loader())
        states.append(plain([module.state_dict(), run.optimizers[0].state_dict(), torch.rand(2), module.seen]))
    assert states[0] == states[1]
    assert len(load_run(tmp_path / "b" / "log")["relative_loss"]) == 8


@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("fail_at", [1, 2, 5])
def test_parameters_are_restored_when_the_loss_raises(tmp_path: Path, along: str, fail_at: int) -> None:
    calls, expected = [], []

    class Remembers(SmallNet):
        def configure_optimizers(self) -> Any:
            made = super().configure_optimizers()
            made.register_step_post_hook(lambda *_: expected.append(self.bits()))
            return made

        def bits(self) -> Any:
            return plain([self.state_dict(), [p.grad for p in self.parameters()]])

    class Before(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            expected.append(pl_module.bits())

    def loss(module: Any, batch: Any) -> Tensor:
        calls.append(1)
        module.net[1].running_mean.add_(1.0)
        if len(calls) == fail_at:
            raise RuntimeError("from the user's loss")
        return module.net(batch[0]).square().mean()

    module, measured = Remembers("adamw"), RelativeLoss(1, loss=loss, along=along)
    run = trainer(str(tmp_path), callbacks=[Before(), measured])
    with pytest.raises(RuntimeError, match="from the user's loss"):
        run.fit(module, loader())
    assert len(calls) == fail_at
    assert len(expected) == (1 if along == "gradient" else 2)
    assert module.bits() == expected[-1]
    assert "log" not in vars(module)
    assert type(run.logger).__name__ == "CSVLogger"
    assert len(run.optimizers[0]._optimizer_step_post_hooks) == 1  # the module's own


def test_a_graph_that_holds_an_attribute_stays_valid() -> None:
    """As under manual optimization, where one backward pass may come after another one's step."""
    module = nn.Linear(2, 2)
    module.kept = torch.ones(2)
    out = (module.weight * module.kept).sum()
    snapshot = Snapshot(module, moved=module.parameters())
    snapshot.restore()
    out.backward()
    assert module.weight.grad is not None


class Strict(dict[str, int]):
    """Refuses changes by its own methods, but for one."""

    def add(self, name: str) -> None:
        dict.__setitem__(self, name, len(self))

    def clear(self) -> None:
        raise AssertionError

    __setitem__ = update = clear  # type: ignore[assignment]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_random_streams_return_after_an_error(error: type[BaseException]) -> None:
    states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]

    def draw() -> None:
        random.random(), np.random.rand(), torch.rand(1)
        raise error

    with pytest.raises(error), own_random_streams():
        draw()
    assert states == [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def test_a_container_is_put_back_without_its_own_methods() -> None:
    module = nn.Linear(2, 2)
    module.strict = Strict(a=1)
    snapshot = Snapshot(module)
    module.strict.add("b")
    snapshot.restore()
    assert module.strict == {"a": 1}


def test_a_container_that_is_as_it_was_is_not_touched() -> None:
    module = nn.Linear(2, 2)
    module.kept = deque([1, 2])
    reading = iter(module.kept)  # which a change would break
    assert next(reading) == 1
    Snapshot(module).restore()
    assert next(reading) == 2


def test_a_logger_keeps_its_folders(tmp_path: Path) -> None:
    folders = set()

    class Looks(SmallNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            folders.add((self.logger.log_dir, self.logger.save_dir, self.logger.name, self.logger.version))
            return super().training_step(batch, batch_idx)

    trainer(str(tmp_path), callbacks=[RelativeLoss(1)], max_steps=2).fit(Looks(), loader())
    assert len(folders) == 1


def test_the_users_own_autocast_does_not_hold_the_parameters_of_another_point(tmp_path: Path) -> None:
    """Its cache would give the casts of the parameters as they were first."""

    class Manual(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False))

        def training_step(self, batch: Any, batch_idx: int) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                self.optimizers().zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                self.optimizers().step()

    def loss(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module.net(batch[0]).float(), batch[1])

    callbacks = [RelativeLoss(1, loss=loss, multiples=[16.0, 64.0])]
    trainer(str(tmp_path), callbacks=callbacks, max_steps=2).fit(Manual(), loader())
    rows = load_run(tmp_path / "log")["relative_loss"]
    assert all(len({1.0, *curve}) == 3 for curve in rows["relative"])
