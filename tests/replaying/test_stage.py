"""The run of a capsule, set up again: the same steps, bit for bit, and passes that move nothing."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from perturbation import differences
from ranks import run_function
from replays_small import ALARM, Net, replay_on, run, run_ranks_of
from torch import nn

from normzoo import load_capsule
from normzoo.replaying import ReplayError
from normzoo.replaying.fit import in_a_fit
from normzoo.replaying.stage import Stage

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated and clipped": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5},
    "momentum": {"net": {"optimizer": "SGD", "rate": 0.1}},
    "manual": {"net": {"manual": True}, "alarm": 12},
    "bfloat16": {"precision": "bf16-mixed"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {name: run(root / name.replace(" ", "_"), **options) for name, options in CASES.items()}


def bits(losses: list[list[float]]) -> bytes:
    return np.asarray(losses, dtype=np.float32).tobytes()


def module_of(case: str) -> Net:
    return Net(**CASES[case].get("net", {}))


@pytest.mark.parametrize("case", CASES)
def test_the_steps_are_those_of_the_run_bit_for_bit_and_passes_move_nothing(
    folders: dict[str, Path], case: str
) -> None:
    module = module_of(case)
    before = copy.deepcopy(module.state_dict())
    compared = []

    def ask(stage: Stage) -> None:
        assert stage.alarm == CASES[case].get("alarm", ALARM)
        assert stage.steps[0] in stage.snapshots
        assert stage.alarm in stage.steps
        for step in stage.steps:
            compared.append(step)
            here = copy.deepcopy([stage.tensors(), stage.run.optimizers[0].state_dict()])
            losses, (loss, gradients) = stage.losses(step), stage.backward(step)
            assert not differences(here, [stage.tensors(), stage.run.optimizers[0].state_dict()])
            assert all(p.grad is None for p in stage.module.parameters())
            frame = stage.frame(step)
            trained = stage.train(step)
            known = [loss for loss in frame.losses if None not in loss]
            assert bits(stage.last_losses[: len(known)]) == bits(known)
            if case == "manual":  # where the loss that training_step returns comes after its updates
                continue
            assert bits(losses) == bits(stage.last_losses)
            assert loss == pytest.approx(trained, rel=1e-6)
            if frame.norm is not None:
                norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
                assert stage.last_norm == pytest.approx(frame.norm, rel=1e-6)
                assert norm == pytest.approx(frame.norm, rel=1e-2 if case == "bfloat16" else 1e-5)

    in_a_fit(load_capsule(folders[case]), module, ask)
    assert len(compared) > 4
    assert not differences(before, module.state_dict())
    assert all(p.grad is None for p in module.parameters())


def test_any_state_can_be_gone_to(folders: dict[str, Path]) -> None:
    def ask(stage: Stage) -> None:
        first, later = stage.steps[0], stage.steps[3]
        stage.go_to(later)
        there = copy.deepcopy(stage.tensors())
        stage.keep()
        stage.go_to(first)
        with stage.aside():
            stage.set_parameters({name: torch.zeros_like(p) for name, p in stage.parameters().items()})
            assert stage.loss(first) == pytest.approx(math.log(3))
        stage.go_to(later)
        assert not differences(there, stage.tensors())
        stage.train(later, rate=0.5)
        assert differences(there, stage.tensors())
        stage.go_to(later)
        assert not differences(there, stage.tensors())

    in_a_fit(load_capsule(folders["momentum"]), module_of("momentum"), ask)


def test_rates_and_clipping_act_on_the_update(folders: dict[str, Path]) -> None:
    """Of plain gradient descent the length of an update is the rate times the norm at which the gradient is clipped."""
    lengths = {}

    def ask(stage: Stage) -> None:
        step = stage.steps[0]
        for name, options in {"own": {}, "half": {"rate": 0.5}, "clipped": {"clip": 1e-3}}.items():
            stage.go_to(step)
            before = stage.parameters()
            stage.train(step, **options)  # type: ignore[arg-type]
            after = stage.parameters()
            lengths[name] = math.sqrt(sum(float((after[n] - p).double().square().sum()) for n, p in before.items()))
            lengths[f"{name} norm"] = stage.last_norm
        lengths["lr"] = stage.frame(step).lr or 0.0

    in_a_fit(load_capsule(folders["momentum"]), module_of("momentum"), ask)
    assert lengths["own"] == pytest.approx(lengths["lr"] * lengths["own norm"], rel=1e-4)
    assert lengths["half"] == pytest.approx(lengths["own"] / 2, rel=1e-4)
    assert lengths["clipped"] == pytest.approx(lengths["lr"] * 1e-3, rel=1e-3)
    assert lengths["clipped norm"] == lengths["own norm"]


def test_half_precision_can_be_left(folders: dict[str, Path]) -> None:
    dtypes: dict[str, Any] = {}

    def ask(stage: Stage) -> None:
        stage.go_to(stage.steps[0])
        conv = stage.module.net[0]

        def hear(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            dtypes.setdefault("seen", []).append(output.dtype)

        handle = conv.register_forward_hook(hear)
        dtypes["losses"] = [stage.loss(stage.steps[0])]
        with stage.float32():
            dtypes["losses"].append(stage.loss(stage.steps[0]))
        dtypes["losses"].append(stage.loss(stage.steps[0]))
        handle.remove()

    in_a_fit(load_capsule(folders["bfloat16"]), module_of("bfloat16"), ask)
    assert dtypes["seen"] == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert dtypes["losses"][0] == dtypes["losses"][2] != dtypes["losses"][1]
    assert dtypes["losses"][1] == pytest.approx(dtypes["losses"][0], rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda net: net.net.append(nn.Linear(3, 3)),
            "the module has a tensor 'net.6.weight', and the capsule has none",
        ),
        (
            lambda net: setattr(net.net, "5", nn.Linear(144, 4)),
            r"'net.5.weight' has the shape \(3, 144\) in the capsule",
        ),
        (lambda net: net.net.pop(5), "the capsule has a tensor 'net.5.weight', and the module has none of this name"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(folders: dict[str, Path], change: Any, message: str) -> None:
    module = module_of("plain")
    change(module)
    with pytest.raises(ReplayError, match=message):
        in_a_fit(load_capsule(folders["plain"]), module, lambda stage: None)


@pytest.mark.parametrize("kind", [pytest.param("whole", marks=pytest.mark.slow), "sharded"])
def test_on_as_many_ranks_the_steps_are_the_same_bit_for_bit(tmp_path: Path, kind: str) -> None:
    run_function(tmp_path / "train", run_ranks_of, 2, str(tmp_path), kind, deadline=120)
    run_function(tmp_path / "replay", replay_on, 2, str(tmp_path), kind, deadline=120)
    rows = json.loads((tmp_path / "replayed.json").read_text())
    assert len(rows) > 4
    for row in rows:
        assert len(row["losses"][0]) == 2
        known = [losses for losses in row["recorded"] if None not in losses]
        assert bits(row["losses"][: len(known)]) == bits(known)
        assert bits(row["before"]) == bits(row["losses"])
        if row["recorded_norm"] is not None:
            assert row["norm"] == pytest.approx(row["recorded_norm"], rel=1e-6)
            assert row["gradient"] == pytest.approx(row["recorded_norm"], rel=1e-5)


def test_one_process_stands_for_several_ranks(tmp_path: Path) -> None:
    run_function(tmp_path / "train", run_ranks_of, 2, str(tmp_path), "whole", deadline=120)
    replay_on(str(tmp_path), "whole")
    rows = json.loads((tmp_path / "replayed.json").read_text())
    for row in rows[:4]:
        assert np.allclose(row["losses"], row["recorded"], rtol=1e-4)
        assert row["norm"] == pytest.approx(row["recorded_norm"], rel=1e-3)
        assert row["mean"] == pytest.approx(np.mean(row["recorded"]), rel=1e-4)


class Masked(Net):
    """A network that loses a channel of its first layer at a step, in a hook of its own."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == ALARM:
            self.net[0].weight.data[0] = 0
            self.net[0].bias.data[0] = 0


def test_passes_see_what_the_module_does_at_the_start_of_a_batch(folders: dict[str, Path]) -> None:
    module, kept = Masked(), {}

    def ask(stage: Stage) -> None:
        stage.go_to(stage.alarm)
        kept["before"] = stage.parameters()["net.0.weight"]
        kept["gradient"] = stage.backward(stage.alarm)[1]["net.1.weight"][0]
        stage.loss(stage.alarm)
        kept["after"] = stage.parameters()["net.0.weight"]
        kept["other"] = stage.backward(stage.steps[0])[1]["net.1.weight"][0]

    in_a_fit(load_capsule(folders["plain"]), module, ask)
    assert kept["gradient"] == 0 != kept["other"]
    assert torch.equal(kept["before"], kept["after"])
    assert kept["after"][0].any()
