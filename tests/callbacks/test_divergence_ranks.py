"""Divergence on two ranks: the spike rule judges the largest loss of all, and of both sides the smallest too."""

from __future__ import annotations

from pathlib import Path

import torch
from ranks import run_ranks

from normzoo import load_run

SCRIPT = """
import os, sys, torch
sys.path.insert(0, os.environ["TESTS"])
from callbacks_small import SmallNet, loader, trainer
from normzoo.callbacks import Divergence

class Net(SmallNet):
    def training_step(self, batch, batch_idx):
        step, high = self.trainer.global_step, self.global_rank == 1
        loss = -14.0 + 0.01 * (step % 3) + 0.5 * high
        loss = {11: -9.0 if high else -14.0, 8: -14.0 if high else -20.0}.get(step, loss)
        return self.net(batch[0]).sum() * 0 + loss

callbacks = [Divergence(spike=8.0, window=5, stop=True), Divergence(spike=8.0, window=5, two_sided=True, label="both")]
net = Net()
fitted = trainer(".", callbacks=callbacks, strategy="ddp", devices=2, logger=False)
fitted.fit(net, loader(320))
found = [fitted.global_step, *(callback.state_dict() for callback in callbacks)]
torch.save(found, f"rank{net.global_rank}.pt")
"""


def test_the_largest_loss_over_ranks_is_judged_alike_on_all(tmp_path: Path) -> None:
    run_ranks(tmp_path, SCRIPT, 2)
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    assert ranks[0] == ranks[1]
    steps, up, both = ranks[0]
    assert (steps, up["step"], up["loss"], up["rule"]) == (13, 11, -9.0, "spike")
    assert (both["step"], both["loss"], both["rule"]) == (8, -20.0, "drop")
    frames = load_run(tmp_path), load_run(tmp_path / "normzoo_logs" / "version_0" / "both")
    assert [frame["divergence"]["step"].tolist() for frame in frames] == [[11], [8]]
