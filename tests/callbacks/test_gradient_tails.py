"""GradientTails against gradients computed by hand."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import scipy.stats
import torch
from callbacks_small import SmallNet, TwoOptimizers, loader, trainer

from normzoo import load_run
from normzoo.callbacks import GradientTails, RelativeLoss


class Gradients(pl.Callback):
    """Keeps what the optimizer is about to use."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def rows(folder: Path) -> list[dict[str, Any]]:
    return load_run(folder / "log")["gradient_tails"].to_dict("records")


def test_the_record_agrees_with_the_gradients(tmp_path: Path) -> None:
    gradients = Gradients()
    callback = GradientTails(3, mantissa_bits=4)
    run = trainer(str(tmp_path), callbacks=[gradients, callback], max_steps=8, gradient_clip_val=1e-3)
    run.fit(SmallNet(), loader())
    found = rows(tmp_path)
    assert sorted({r["step"] for r in found}) == [0, 3, 6]
    assert {r["layer"] for r in found} == set(gradients.seen[0])
    for row in found:
        g = gradients.seen[row["step"]][row["layer"]].double().numpy().ravel()
        magnitude = np.sort(np.abs(g))
        assert row["size"] == g.size == row["histogram"][:, 1].sum()
        assert row["max"] == pytest.approx(magnitude[-1], rel=1e-6)
        assert row["l2"] == pytest.approx(np.linalg.norm(g), rel=1e-5)
        assert row["kurtosis"] == pytest.approx(scipy.stats.kurtosis(g), rel=1e-3, abs=1e-3)
        for name, q in (("q50", 0.5), ("q99", 0.99), ("q999", 0.999)):
            assert row[name] == pytest.approx(np.quantile(magnitude, q, method="inverted_cdf"), rel=2**-5)
        assert row["zeros"] == np.count_nonzero(g == 0)
        assert row["nonfinite"] == 0


def test_scalars_reach_the_logger(tmp_path: Path) -> None:
    trainer(str(tmp_path), callbacks=[GradientTails(1)], max_steps=2).fit(SmallNet(), loader())
    header = (tmp_path / "log" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "gradient/kurtosis/net.0.weight" in header
    assert "gradient/alpha/net.6.weight" in header


def test_patterns_choose_parameters(tmp_path: Path) -> None:
    trainer(str(tmp_path), callbacks=[GradientTails(1, parameters="net.0.*")], max_steps=1).fit(SmallNet(), loader())
    assert {r["layer"] for r in rows(tmp_path)} == {"net.0.weight"}


def test_a_pattern_that_matches_nothing_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parameter matches 'conv\\*'; there are net.0.weight"):
        trainer(str(tmp_path), callbacks=[GradientTails(parameters="conv*")]).fit(SmallNet(), loader())


def test_non_finite_gradients_are_counted_and_written_as_they_are(tmp_path: Path) -> None:
    class Spoils(pl.Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[6].weight.grad.fill_(0.25)
            pl_module.net[6].weight.grad[0, :3] = torch.tensor([float("nan"), float("inf"), 0.0])

    trainer(str(tmp_path), callbacks=[Spoils(), GradientTails(1)], max_steps=1).fit(SmallNet(), loader())
    row = next(r for r in rows(tmp_path) if r["layer"] == "net.6.weight")
    assert row["nonfinite"] == 2
    assert row["zeros"] == 1
    assert math.isnan(row["kurtosis"])
    assert row["q50"] == pytest.approx(0.25, rel=2**-4)
    assert row["max"] == math.inf or math.isnan(row["max"])


def test_accumulation_measures_the_sum_the_optimizer_uses(tmp_path: Path) -> None:
    gradients = Gradients()
    run = trainer(str(tmp_path), callbacks=[gradients, GradientTails(1)], max_steps=2, accumulate_grad_batches=4)
    run.fit(SmallNet(), loader())
    assert len(gradients.seen) == 2
    row = next(r for r in rows(tmp_path) if r["step"] == 1 and r["layer"] == "net.6.weight")
    assert row["l2"] == pytest.approx(gradients.seen[1]["net.6.weight"].norm().item(), rel=1e-5)


def test_several_optimizers_under_manual_optimization(tmp_path: Path) -> None:
    trainer(str(tmp_path), callbacks=[GradientTails(1)], max_steps=4).fit(TwoOptimizers(), loader())
    by_step = {s: {r["layer"] for r in rows(tmp_path) if r["step"] == s} for s in {r["step"] for r in rows(tmp_path)}}
    assert by_step[0] == by_step[2] == {"net.0.weight", "net.1.weight", "net.1.bias"}
    assert by_step[1] == by_step[3] == {"net.6.weight", "net.6.bias"}


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_continues_the_record_without_a_seam(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    log = tmp_path / "log"

    def run(steps: int, **options: Any) -> None:
        saves = ModelCheckpoint(tmp_path, filename="at-{step}", every_n_train_steps=9, save_top_k=-1)
        callbacks = [GradientTails(2, dirpath=str(log)), RelativeLoss(4, dirpath=str(log)), saves]
        made = trainer(str(tmp_path), callbacks=callbacks, max_steps=steps, logger=False, enable_checkpointing=True)
        made.fit(SmallNet(), loader(), **options)

    pl.seed_everything(0, verbose=False)
    run(13)  # goes on after its checkpoint at 9, then is lost
    segment = log / "gradient_tails-000.arrows"
    os.truncate(segment, segment.stat().st_size - 9)  # killed while writing
    run(16, ckpt_path=tmp_path / "at-step=9.ckpt", weights_only=False)
    assert [r["step"] for r in rows(tmp_path) if r["layer"] == "net.0.weight"] == [0, 2, 4, 6, 8, 10, 12, 14]
    frames = load_run(log)
    assert frames["relative_loss"]["step"].tolist() == [0, 4, 8, 12]
    assert {name: frame.attrs["segments"] for name, frame in frames.items()} == {
        "gradient_tails": 2,
        "relative_loss": 2,
    }
    assert frames["gradient_tails"].attrs["broken_batches"] == 1


def test_a_checkpoint_holds_no_sample_back(tmp_path: Path) -> None:
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "now.ckpt")
            assert rows(tmp_path)[-1]["step"] == trainer.global_step - 1

    trainer(str(tmp_path), callbacks=[GradientTails(1), Saves()], max_steps=3).fit(SmallNet(), loader())


def test_sparse_gradients_count_their_zeros(tmp_path: Path) -> None:
    class Embeds(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(50, 3, sparse=True)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.table(batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer(str(tmp_path), callbacks=[GradientTails(1), RelativeLoss(1)], max_steps=2).fit(Embeds(), loader())
    for row in rows(tmp_path):
        assert row["size"] == 150
        assert row["zeros"] >= 150 - 4 * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
        ({"tail_fraction": 1.0}, "tail_fraction must be between 0 and 1"),
        ({"mantissa_bits": 9}, "mantissa_bits must be from 0 to 7"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientTails(**options)
