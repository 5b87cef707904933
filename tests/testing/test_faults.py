"""Faults on purpose: each happens where and when it is asked for, and leaves nothing that it should not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callbacks_small import SmallNet, loader, trainer
from lightning.pytorch.plugins import MixedPrecision
from ranks import run_function, start_script

from normzoo.testing import FAULTS, FaultInjector, InjectedFaultError

STEP = 2


class Notes(pl.Callback):
    """Losses, gradients, weights and learning rates as the step meets them."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[list[torch.Tensor]] = []
        self.weights: list[list[torch.Tensor]] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append([p.grad.clone() for p in pl_module.parameters()])
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())


def fit(folder: Path, *faults: FaultInjector, net: SmallNet | None = None, **options: Any) -> tuple[Notes, SmallNet]:
    pl.seed_everything(3, verbose=False)
    notes, net = Notes(), net or SmallNet()
    trainer(str(folder), callbacks=[*faults, notes], **{"max_steps": 5, **options}).fit(net, loader())
    return notes, net


def finite(tensors: list[torch.Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)


@pytest.mark.parametrize("fault", ["loss_nan", "loss_inf", "batch_nan", "batch_inf"])
def test_a_loss_that_is_not_finite_is_that_of_one_step(tmp_path: Path, fault: str) -> None:
    injector = FaultInjector(fault, step=STEP)
    notes, net = fit(tmp_path, injector)
    assert [math.isfinite(loss) for loss in notes.losses[: STEP + 1]] == [True] * STEP + [False]
    assert injector.injected == 1
    assert "training_step" not in vars(net)
    if fault == "loss_nan":
        assert not finite(notes.gradients[STEP])


def test_the_images_are_scaled_for_one_step_and_stay_as_they_are(tmp_path: Path) -> None:
    plain, _ = fit(tmp_path / "plain")
    notes, _ = fit(tmp_path / "scaled", FaultInjector("batch_scale", step=STEP))
    assert notes.losses[:STEP] == plain.losses[:STEP]
    assert notes.losses[STEP] != plain.losses[STEP]
    batches = [x for x, _ in loader()]
    assert all(float(x.abs().max()) < 1e3 for x in batches)


@pytest.mark.parametrize("fault", ["gradient_nan", "gradient_inf"])
@pytest.mark.parametrize("point", [None, "before step"])
def test_a_value_of_a_gradient_is_broken(tmp_path: Path, fault: str, point: str | None) -> None:
    notes, net = fit(tmp_path, FaultInjector(fault, step=STEP, point=point, parameter="net.6.weight"))
    index = [name for name, _ in net.named_parameters()].index("net.6.weight")
    broken = [not finite([g]) for g in notes.gradients[STEP]]
    assert broken == [i == index for i in range(len(broken))]
    assert (~notes.gradients[STEP][index].isfinite()).sum() == 1
    assert all(map(finite, notes.gradients[:STEP]))


@pytest.mark.parametrize("fault", ["weight_nan", "weight_inf", "weight_bit"])
def test_a_value_of_a_weight_is_broken(tmp_path: Path, fault: str) -> None:
    plain, _ = fit(tmp_path / "plain")
    notes, _ = fit(tmp_path / "broken", FaultInjector(fault, step=STEP, point="batch start"))
    before, after = plain.weights[STEP], notes.weights[STEP]
    assert all(map(torch.equal, before[1:], after[1:]))
    changed = (before[0] != after[0]).flatten()
    assert changed.tolist() == [True] + [False] * (len(changed) - 1)
    if fault == "weight_bit":
        a, b = (w[0].flatten()[:1].view(torch.int32).item() for w in (before, after))
        assert a ^ b == 1 << 30


def test_the_learning_rate_is_raised_for_one_step(tmp_path: Path) -> None:
    notes, _ = fit(tmp_path, FaultInjector("learning_rate", step=STEP, point="batch start"))
    rate = notes.rates[0]
    assert notes.rates == [rate, rate, rate * 1000, rate, rate]


def test_a_schedule_goes_on_after_a_raised_rate(tmp_path: Path) -> None:
    class Net(SmallNet):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    notes, _ = fit(tmp_path, FaultInjector("learning_rate", step=STEP), net=Net())
    assert notes.rates == pytest.approx([0.5, 0.25, 125.0, 0.0625, 0.03125])


def test_a_channel_has_no_variance_for_one_step(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    class Net(SmallNet):
        def on_train_start(self) -> None:
            self.net[1].register_forward_hook(lambda m, args, output: seen.append(args[0].var((0, 2, 3))))

    fit(tmp_path, FaultInjector("dead_channel", step=STEP), net=Net())
    assert [bool(v[0] == 0) for v in seen] == [step == STEP for step in range(5)]
    assert all((v[1:] > 0).all() for v in seen)


def test_an_overflow_is_skipped_by_a_grad_scaler(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    injector = FaultInjector("overflow", step=STEP)
    fit(tmp_path, injector, plugins=[plugin])
    assert injector.injected == 1
    assert scaler.get_scale() < 2.0**8
    with pytest.raises(
        ValueError, match="the fault overflow needs precision='16-mixed' or '16-true', and it is '32-true'"
    ):
        fit(tmp_path / "wide", FaultInjector("overflow", step=0))


@pytest.mark.parametrize("point", FAULTS["exception"].points)
def test_an_exception_comes_at_its_point(tmp_path: Path, point: str) -> None:
    with pytest.raises(InjectedFaultError, match=f"the fault that was asked for, at {point} of step 2"):
        fit(tmp_path, FaultInjector("exception", step=STEP, point=point))


def test_all_micro_batches_of_a_step_are_met(tmp_path: Path) -> None:
    injector = FaultInjector("loss_nan", step=1)
    notes, _ = fit(tmp_path, injector, accumulate_grad_batches=2, max_steps=3)
    assert injector.injected == 2
    assert [math.isfinite(loss) for loss in notes.losses[:4]] == [True, True, False, False]


def of_one_rank(folder: str) -> None:
    injector = FaultInjector("loss_nan", step=1, ranks=[1])
    notes = Notes()
    made = trainer(folder, callbacks=[injector, notes], max_steps=3, strategy="ddp", devices=2, logger=False)
    made.fit(SmallNet(), loader())
    torch.save((injector.injected, notes.losses), f"{folder}/rank{made.global_rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_fault_is_on_the_ranks_that_are_chosen(tmp_path: Path) -> None:
    run_function(tmp_path, of_one_rank, 2, str(tmp_path))
    (none, first), (one, second) = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
    assert (none, one) == (0, 1)
    assert math.isfinite(first[1])
    assert not math.isfinite(second[1])


SIGNALLED = """
import os, sys
sys.path.insert(0, os.environ["TESTS"])
from callbacks_small import SmallNet, loader, trainer
from normzoo.testing import FaultInjector
trainer(".", callbacks=[FaultInjector(sys.argv[1], step=1)], max_steps=3, logger=False).fit(SmallNet(), loader())
print("went on")
"""


@pytest.mark.parametrize(("fault", "expected"), [("sigkill", -9), ("sigterm", 0)])
def test_a_signal_ends_the_process(tmp_path: Path, fault: str, expected: int) -> None:
    """Lightning ends a fit at SIGTERM without an error, and the process with it."""
    started = start_script(tmp_path, SIGNALLED, fault)
    [code] = started.ended_with(100)
    assert code == expected, started.output[-500:]
    assert "went on" not in started.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fault": "loss_non", "step": 0}, "'loss_non' is not a known fault; did you mean 'loss_nan'"),
        ({"fault": "loss_nan", "step": -1}, "step must be a whole number of at least 0, not -1"),
        ({"fault": "loss_nan", "step": True}, "step must be a whole number of at least 0, not True"),
        ({"fault": "loss_nan", "step": 0, "point": "batch edn"}, "'batch edn' is not a known point; did you mean"),
        (
            {"fault": "loss_nan", "step": 0, "point": "batch end"},
            "the fault loss_nan happens at 'batch start', not at 'batch end'",
        ),
    ],
)
def test_what_is_asked_wrongly_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaultInjector(**options)


@pytest.mark.parametrize(("what", "name"), [("parameter", "net.0.wieght"), ("module", "net.11")])
def test_what_the_network_has_not_is_refused_at_setup(tmp_path: Path, what: str, name: str) -> None:
    fault = "weight_nan" if what == "parameter" else "dead_channel"
    with pytest.raises(ValueError, match=f"'{name}' is not a known"):
        fit(tmp_path, FaultInjector(fault, step=0, **{what: name}))  # type: ignore[arg-type]


def test_a_run_without_the_step_is_the_run_without(tmp_path: Path) -> None:
    plain, _ = fit(tmp_path / "plain")
    for fault in FAULTS:
        if fault != "overflow":
            notes, _ = fit(tmp_path / fault, FaultInjector(fault, step=99))
            assert notes.losses == plain.losses


def test_the_page_lists_the_faults() -> None:
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")
    rows = [line for line in page.split("\n## Faults on purpose\n")[1].splitlines() if line.startswith("| `")]
    assert rows == [f"| `{name}` | {fault.text} |" for name, fault in FAULTS.items()]
