"""Divergence on two ranks: what one of them shows is an alarm on both, at the same step, and both do the same."""

from __future__ import annotations

from pathlib import Path

import torch
from ranks import run_ranks

from normzoo import load_capsule, load_run

SCRIPT = """
import os, sys, torch
sys.path.insert(0, os.environ["TESTS"])
from callbacks_small import SmallNet, loader, trainer
from normzoo.callbacks import Divergence, LossAbove, LossSpike, Stop

class Net(SmallNet):
    def training_step(self, batch, batch_idx):
        step, high = self.trainer.global_step, self.global_rank == 1
        loss = -14.0 + 0.01 * (step % 3) + 0.5 * high
        loss = {11: -9.0 if high else -14.0, 8: -14.0 if high else -20.0}.get(step, loss)
        return self.net(batch[0]).sum() * 0 + loss

usual = [LossAbove(), LossSpike(8.0, window=5)]
callbacks = [
    Divergence(rules=usual, action=Stop(None)),
    Divergence(rules=[LossAbove(), LossSpike(8.0, window=5, two_sided=True)], label="both"),
]
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


ACTIONS = """
import copy, os, sys, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, os.environ["TESTS"])
from callbacks_small import SmallNet, images, loader, trainer
from normzoo import watch
from normzoo.callbacks import *

results = {}

class Net(SmallNet):
    def __init__(self, losses=(), gradient=0):
        super().__init__()
        self.net[1], self.net[3] = nn.Identity(), nn.Identity()
        self.losses, self.gradient, self.before = dict(losses), gradient, {}
    def training_step(self, batch, batch_idx):
        self.before[batch_idx] = copy.deepcopy(self.net.state_dict())
        loss = super().training_step(batch, batch_idx)
        return loss * self.losses.get(batch_idx, 1.0) if self.global_rank == 1 else loss
    def on_before_backward(self, loss):
        if self.global_step == self.gradient > 0 and self.global_rank == 1:
            self.net[0].weight.register_hook(lambda g: g * 1e9)  # on this rank, before the reduction

def fit(name, net, *callbacks):
    error = None
    try:
        fitted = trainer(name, callbacks=[*callbacks], strategy="ddp", devices=2, max_steps=20, logger=False)
        fitted.fit(net, loader(320))
    except (DivergenceError, DivergenceExit) as raised:
        error = raised
    alarm = error and error.alarm
    same = {k: torch.equal(v, net.before[alarm.step][k]) for k, v in net.net.state_dict().items()} if alarm else {}
    results[name] = [type(error).__name__, alarm, fitted.global_step, all(same.values())]
    return error

fit("stop", Net({4: 1e6}), Divergence(action=Stop()))
fit("raise", Net({4: float("nan")}), Divergence(action=Raise()))
fit("strict", Net({4: 1e6}), Divergence(action=Stop(), strict=True, recorder=False))
fit("gradient", Net(gradient=13), GradientNorm(), Divergence(action=Raise(), recorder=False))
fit("strict gradient", Net(gradient=13), GradientNorm(), Divergence(action=Raise(), strict=True, recorder=False))
rules = [ActivationsAbove(1e4, "net.4")]

class Sometimes(Net):
    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and batch_idx == 3:
            self.net[4](batch[0] * 1e6)  # which the other rank calls later, and with less
        return super().training_step(batch, batch_idx)

fit("activations", Sometimes(), Divergence(rules=rules, action=Stop(), recorder=False))

# A plain loop, in which rank zero saves by itself
rank, data = dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"]), images(64)
if not dist.is_initialized():
    dist.init_process_group("gloo")
model = DistributedDataParallel(Net().net)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
steps, alarms, states = 0, [], []

class Noted(Stop):
    def act(self, run, alarm):
        alarms.append((run.step, alarm.step, alarm.rank, alarm.capsule is not None))
        super().act(run, alarm)

try:
    with watch(model, optimizer, GradientNorm(), Divergence(action=Noted()), dirpath="loop") as watching:
        for step in range(9):
            optimizer.zero_grad()
            x, y = data[8 * rank : 8 * rank + 8]
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            watching.loss(loss * (1e9 if (rank, step) == (1, 5) else 1))
            if rank == 0:
                states.append(watching.state_dict()["callbacks"][1][1]["step"])
            if watching.should_stop:
                break
            optimizer.step()
except DivergenceExit as error:
    results["loop"] = [error.code, watching.step, alarms, None]
    if rank == 0:
        assert states[4:6] == [None, 5], states  # rank zero knows before the others, and waits
torch.save(results, f"actions{rank}.pt")
"""


def test_an_alarm_of_one_rank_is_acted_on_by_both_at_the_same_step(tmp_path: Path) -> None:
    run_ranks(tmp_path, ACTIONS, 2)
    first, second = (torch.load(tmp_path / f"actions{rank}.pt", weights_only=False) for rank in range(2))
    for results in (first, second):
        said = {
            name: (kind, alarm.step, alarm.rule, alarm.rank, steps)
            for name, (kind, alarm, steps, *_) in results.items()
            if name != "loop"
        }
        assert said == {
            "stop": ("DivergenceExit", 4, "threshold", 1, 6),
            "raise": ("DivergenceError", 4, "not finite", 1, 6),
            "strict": ("DivergenceExit", 4, "threshold", 1, 5),
            "gradient": ("DivergenceError", 13, "gradient spike", None, 15),
            "strict gradient": ("DivergenceError", 13, "gradient spike", None, 13),
            "activations": ("DivergenceExit", 3, "activations of net.4", 1, 5),
        }
        assert [results[name][3] for name in ("strict", "strict gradient")] == [True, True]  # no update was made
        assert results["loop"] == [79, 6, [(6, 5, 1, True)], None]
    assert first["stop"][1] == second["stop"][1]
    assert "on rank 1" in first["stop"][1].sentence
    for name in ("stop", "raise"):
        folder = tmp_path / name / "normzoo_logs" / "version_0"
        [row] = load_run(folder)["divergence"].to_dict("records")
        assert (row["step"], row["rank"], row["stopped"]) == (4, 1, True)
        assert load_capsule(folder / row["capsule"]).about["missing"] == []
    assert torch.load(tmp_path / "stop" / "normzoo_logs" / "version_0" / "diverged.ckpt", weights_only=False)
    assert load_capsule(tmp_path / "loop").about["missing"] == []
