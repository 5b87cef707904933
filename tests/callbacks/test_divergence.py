"""Divergence: the rules, the step it names, stopping, and the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks_small import SmallNet, loader, trainer

from normzoo import load_run
from normzoo.callbacks import Divergence


class Scripted(SmallNet):
    """Returns a given loss at each batch."""

    def __init__(self, losses: dict[int, float]) -> None:
        super().__init__(lr=0.0)
        self.losses = losses

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        wanted = self.losses.get(batch_idx, 1.0)
        return self.net(batch[0]).sum() * 0 + wanted


def run(folder: Path, callback: Divergence, losses: dict[int, float], **options: Any) -> Any:
    t = trainer(str(folder), callbacks=[callback], **options)
    t.fit(Scripted(losses), loader())
    return t


@pytest.mark.parametrize(
    ("loss", "rule"),
    [(1000.5, "threshold"), *((float(v), "not finite") for v in ("nan", "inf", "-inf"))],
)
def test_the_step_and_the_rule(tmp_path: Path, loss: float, rule: str) -> None:
    callback = Divergence()
    assert run(tmp_path, callback, {6: loss, 9: 1e9}).global_step == 20
    assert callback.step == 6
    [row] = load_run(tmp_path / "log")["divergence"].to_dict("records")
    assert row["loss"] == (loss if loss == 1000.5 else float("inf"))
    assert (row["step"], row["rule"], row["stopped"]) == (6, rule, False)


def test_a_loss_at_the_threshold_has_not_diverged(tmp_path: Path) -> None:
    callback = Divergence()
    run(tmp_path, callback, {3: 1000.0})
    assert callback.step is None


def test_stop_ends_training_one_step_later(tmp_path: Path) -> None:
    callback = Divergence(stop=True)
    assert run(tmp_path, callback, {6: 2e3}).global_step == 8
    assert callback.step == 6


def test_the_last_step_is_judged_too(tmp_path: Path) -> None:
    callback = Divergence()
    run(tmp_path, callback, {19: 2e3})
    assert callback.step == 19


def test_a_spike_over_the_running_median(tmp_path: Path) -> None:
    callback = Divergence(spike=5.0, window=4)
    run(tmp_path, callback, {2: 5.5, 10: 5.5})
    assert callback.step == 10  # at step 2 the window was not full


def test_accumulation_counts_optimizer_steps_and_undoes_the_division(tmp_path: Path) -> None:
    callback = Divergence(threshold=90.0)
    run(tmp_path, callback, {7: 100.0}, accumulate_grad_batches=4, max_steps=5)
    assert callback.step == 1
    assert callback.loss == pytest.approx(100.0)


def test_the_checkpoint_remembers(tmp_path: Path) -> None:
    first = Divergence(spike=2.0, window=3)
    for loss in (1.0, 2.0, 3.0):
        first._recent.append(loss)
    first.step, first.loss = 4, 5.0
    second = Divergence(spike=2.0, window=3)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert second.verdict(4.5) == "spike"


def test_manual_optimization_without_a_loss_is_refused(tmp_path: Path) -> None:
    class Manual(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.optimizers().step()

    with pytest.raises(ValueError, match="return\\s+{'loss': loss}"):
        trainer(str(tmp_path), callbacks=[Divergence()]).fit(Manual(), loader())


def test_an_unsupported_strategy_is_refused_at_setup(tmp_path: Path) -> None:
    from types import SimpleNamespace

    class FSDPStrategy: ...

    with pytest.raises(ValueError, match="supports one device and DDP; under FSDPStrategy"):
        Divergence().setup(SimpleNamespace(strategy=FSDPStrategy()), SmallNet(), "fit")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"spike": -1.0}, {"window": 0}])
def test_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        Divergence(**options)
