"""normzoo.watch: in a plain loop the callbacks measure what they measure under a Trainer, and change nothing."""

from __future__ import annotations

import copy
import math
import random
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from callbacks_small import SmallNet, loader, trainer
from lightning.pytorch.loggers import CSVLogger
from sweeps import cells, slow
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from watch_small import STEPS, assert_equal, batch_loss, compiled_in_place, sgd, small_net, train

import normzoo
from normzoo import load_run, watch
from normzoo.callbacks import ChannelMoments, Divergence, GradientTails, LossAbove, RelativeLoss, Stop

DOCS = Path(__file__).parents[2] / "docs" / "callbacks.md"


def every_callback(n: int = 1) -> list[Any]:
    moments = ChannelMoments(n, sites=["norms", "0", "6"], where="both")
    relative_loss = RelativeLoss(n, multiples=[0.5, 1.0, 4.0], loss=batch_loss)
    return [GradientTails(n, of=["gradient", "update"]), moments, relative_loss, Divergence()]


def steps_of(folder: Path, quantity: str = "gradient_tails") -> list[int]:
    return sorted(set(load_run(folder)[quantity]["step"]))


# What is measured


@pytest.mark.parametrize("accumulate", [slow(1), 3])
def test_the_records_are_those_of_a_trainer(tmp_path: Path, accumulate: int) -> None:
    class Net(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.net[3] = nn.Identity()  # a Trainer draws its random numbers elsewhere

    def loss(module: Any, batch: Any) -> Tensor:
        return batch_loss(module.net if isinstance(module, Net) else module, batch)

    def callbacks(prefix: str) -> list[Any]:
        moments = ChannelMoments(3, sites=[f"{prefix}{i}" for i in range(7)], where="both")
        return [
            GradientTails(3, of=["gradient", "update"]),
            moments,
            RelativeLoss(3, loss=loss),
            Divergence(rules=[LossAbove(0.1)]),
        ]

    pl.seed_everything(1, verbose=False)
    fitted = Net()
    model = copy.deepcopy(fitted.net)
    options = {"accumulate_grad_batches": accumulate, "max_steps": 9}
    trainer(str(tmp_path), callbacks=callbacks("net."), **options).fit(fitted, loader())
    optimizer = sgd(model)
    with watch(model, optimizer, *callbacks(""), dirpath=tmp_path / "watch") as watching:
        for group in range(9):
            optimizer.zero_grad()
            batches = list(loader()) + list(loader())
            for batch in batches[group * accumulate : (group + 1) * accumulate]:
                value = batch_loss(model, batch)
                watching.batch(batch)
                watching.loss(value)
                (value / accumulate).backward()
            optimizer.step()
    assert watching.step == 9
    there, here = load_run(tmp_path / "log"), load_run(tmp_path / "watch")
    assert there.keys() == here.keys() == {"gradient_tails", "channel_moments", "relative_loss", "divergence"}
    if accumulate == 3:  # an epoch's last step accumulates less under a Trainer
        there, here = ({k: f[f["step"] < 6] for k, f in frames.items()} for frames in (there, here))
    for quantity in there:
        a, b = there[quantity], here[quantity]
        assert len(a) > 0
        assert len(a) == len(b)
        for column in a.columns:
            for x, y in zip(a[column], b[column], strict=True):
                if isinstance(x, str):
                    assert x.removeprefix("net.") == y
                elif quantity == "divergence":  # Lightning divides for accumulation, and we multiply
                    assert x == pytest.approx(y, rel=1e-6, nan_ok=True)
                else:
                    np.testing.assert_array_equal(x, y, err_msg=f"{quantity} {column}")


def compiled_whole() -> Any:
    return torch.compile(small_net(), backend="eager")


def compiled_part() -> nn.Sequential:
    model = small_net()
    model[1] = torch.compile(model[1], backend="eager")
    return model


def compiled_inside_of_ours() -> nn.Module:
    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(small_net(), backend="eager")

        def forward(self, *, images: Tensor) -> Tensor:
            return self.net(images)

    return Wraps()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at all of a tensor's
@pytest.mark.parametrize(
    ("made", "accumulate"),
    cells(
        [compiled_whole, compiled_part, compiled_inside_of_ours],
        [1, 2],
        fast=[(compiled_whole, 2), (compiled_part, 1), (compiled_inside_of_ours, 2)],
    ),
)
def test_moments_of_a_compiled_model_are_those_of_the_plain_one(tmp_path: Path, made: Any, accumulate: int) -> None:
    def run(name: str, make: Any, watched: bool) -> tuple[nn.Module, list[Tensor]]:
        torch._dynamo.reset()
        pl.seed_everything(4, verbose=False)
        model = make()
        takes_names = hasattr(model, "net")
        optimizer = sgd(model)
        sites = ["norms", "net.0", "0", "net.6", "6"]
        callbacks = [ChannelMoments(2, sites=sites, where="both")] if watched else [Divergence()]
        with watch(model, optimizer, *callbacks, dirpath=tmp_path / name) as watching:
            for batch in list(loader())[:6]:
                watching.loss(0.0)
                for x, y in zip(batch[0].chunk(accumulate), batch[1].chunk(accumulate), strict=True):
                    logits = model(images=x) if takes_names else model(x)
                    F.cross_entropy(logits, y).backward()
                optimizer.step()
                optimizer.zero_grad()
        return model, [*(p.detach() for p in model.parameters()), *model.buffers(), torch.get_rng_state()]

    (plain, _), (_, left), (_, alone) = run("plain", small_net, True), run("a", made, True), run("b", made, False)
    assert all(map(torch.equal, left, alone))
    assert isinstance(plain[1], nn.BatchNorm2d)
    there, here = (load_run(tmp_path / name)["channel_moments"] for name in ("plain", "a"))
    here["layer"] = here["layer"].str.removeprefix("net.")
    assert len(there) == 3 * 3 * 2
    pd.testing.assert_frame_equal(there, here)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_the_users_own_hook_is_run_once_for_what_is_measured(tmp_path: Path) -> None:
    found = []
    for name, make in (("plain", small_net), ("compiled", compiled_part)):
        torch._dynamo.reset()
        pl.seed_everything(4, verbose=False)
        model = make()
        model.register_forward_pre_hook(lambda module, args: (args[0] / 10,))
        with watch(model, optimizer := sgd(model), ChannelMoments(1), dirpath=tmp_path / name):
            train(model, optimizer, steps=2)
        found.append(load_run(tmp_path / name)["channel_moments"])
    pd.testing.assert_frame_equal(*found)


def test_the_gradient_is_what_the_optimizer_uses_after_the_loops_own_clipping(tmp_path: Path) -> None:
    model, seen = small_net(), []

    def clip(step: int) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        seen.append(model[6].weight.grad.norm().item())

    optimizer = sgd(model)
    with watch(model, optimizer, GradientTails(1), dirpath=tmp_path):
        train(model, optimizer, steps=3, before_step=clip)
    frame = load_run(tmp_path)["gradient_tails"]
    assert frame[frame["layer"] == "6.weight"]["l2"].tolist() == pytest.approx(seen, rel=1e-5)


def test_validation_inside_the_loop_is_not_measured(tmp_path: Path) -> None:
    model = small_net()
    optimizer = sgd(model)

    def validate(step: int) -> None:
        with torch.no_grad():
            model(torch.full((50, 1, 8, 8), 100.0))
        model.eval()
        model(torch.full((50, 1, 8, 8), 100.0))
        model.train()

    validate(0)
    with watch(model, optimizer, ChannelMoments(1), dirpath=tmp_path):
        for batch in list(loader())[:3]:
            validate(0)
            batch_loss(model, batch).backward()
            validate(0)
            optimizer.step()
            validate(0)
    assert load_run(tmp_path)["channel_moments"]["count"].tolist() == [8 * 64] * 3


def test_a_step_that_a_grad_scaler_skips_is_none(tmp_path: Path) -> None:
    model = small_net()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    seen = []
    with watch(model, optimizer, *every_callback(), dirpath=tmp_path) as watching:
        for i, batch in enumerate(list(loader())[:5]):
            optimizer.zero_grad()
            loss = batch_loss(model, batch)
            watching.batch(batch)
            watching.loss(loss * (torch.inf if i == 2 else 1))
            scaler.scale(loss).backward()
            if i == 2:
                model[6].bias.grad[0] = torch.inf
            else:
                seen.append(model[6].weight.grad.norm().item() / scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
    assert watching.step == 4
    frames = load_run(tmp_path)
    tails = frames["gradient_tails"]
    assert tails.query("layer == '6.weight' and of == 'gradient'")["l2"].tolist() == pytest.approx(seen, rel=1e-5)
    counts = frames["channel_moments"].query("layer == '1' and where == 'input'")["count"]
    assert counts.tolist() == [512, 512, 1024, 512]  # with the batch of the step that was skipped, as under a Trainer
    assert frames["divergence"]["step"].tolist() == [2]


@pytest.mark.parametrize("along", ["gradient", "update"])
def test_relative_loss_gets_the_model_itself(tmp_path: Path, along: str) -> None:
    model, given = small_net(), []
    optimizer = sgd(model)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        given.append(module)
        with torch.enable_grad():
            return batch_loss(module, batch)

    callbacks = [RelativeLoss(1, loss=loss, along=along), ChannelMoments(1)]
    with watch(model, optimizer, *callbacks, dirpath=tmp_path) as watching:
        train(model, optimizer, watching, steps=4)
    assert {id(m) for m in given} == {id(model)}
    frames = load_run(tmp_path)
    assert frames["relative_loss"]["step"].tolist() == [0, 1, 2, 3]
    assert frames["channel_moments"]["count"].tolist() == [512] * 4  # what it evaluates is no micro-batch
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_divergence_asks_the_loop_to_stop_one_step_later(tmp_path: Path) -> None:
    model = small_net()
    optimizer, asked = sgd(model), []
    with watch(model, optimizer, Divergence(action=Stop(None)), dirpath=tmp_path) as watching:
        train(model, optimizer, watching, losses={5: 2e3}, before_step=lambda _: asked.append(watching.should_stop))
    assert asked.index(True) == 6
    [row] = load_run(tmp_path)["divergence"].to_dict("records")
    assert (row["step"], row["loss"], row["stopped"]) == (5, 2e3, True)


def test_the_last_loss_is_judged_on_leaving(tmp_path: Path) -> None:
    model = small_net()
    optimizer = sgd(model)
    with watch(model, optimizer, Divergence(action=Stop(None)), dirpath=tmp_path) as watching:
        train(model, optimizer, watching, steps=2, losses={1: math.nan})
        assert not watching.should_stop
    assert watching.should_stop
    assert steps_of(tmp_path, "divergence") == [1]


def test_a_checkpoint_of_one_rank_does_not_move_its_stop(tmp_path: Path) -> None:
    model = small_net()
    optimizer = sgd(model)
    with watch(model, optimizer, Divergence(action=Stop(None)), dirpath=tmp_path) as watching:
        train(model, optimizer, watching, steps=1, losses={0: 2e3})
        assert watching.state_dict()["callbacks"][0][1]["step"] == 0
        assert not watching.should_stop  # other ranks learn of it with the next loss
        train(model, optimizer, watching, steps=1)
        assert watching.should_stop


@pytest.mark.parametrize(
    ("model", "quantities"),
    [
        (small_net, {"gradient_norm", "gradient_tails", "channel_moments"}),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), {"gradient_norm", "gradient_tails"}),
        (lambda: torch.compile(small_net(), backend="eager"), {"gradient_norm", "gradient_tails", "channel_moments"}),
        (compiled_in_place, {"gradient_norm", "gradient_tails"}),
    ],
    ids=["norms", "no norms", "compiled", "compiled in place"],
)
def test_by_default_what_can_be_measured_is(tmp_path: Path, model: Any, quantities: set[str]) -> None:
    model = model()
    optimizer = sgd(model)
    with watch(model, optimizer, dirpath=tmp_path):
        train(model, optimizer, steps=2)
    frames = load_run(tmp_path)
    assert frames.keys() == quantities
    assert not any("_orig_mod" in layer for layer in frames["gradient_tails"]["layer"])


def test_two_optimizers_have_a_watch_each(tmp_path: Path) -> None:
    model = small_net()
    first = torch.optim.SGD(model[:2].parameters(), lr=0.1)
    second = torch.optim.AdamW(model[6].parameters())
    with (
        watch(model, first, GradientTails(1), dirpath=tmp_path / "first"),
        watch(model, second, GradientTails(1), dirpath=tmp_path / "second") as watching,
    ):
        for i, batch in enumerate(list(loader())[:4]):
            batch_loss(model, batch).backward()
            first.step()
            if i % 2:
                second.step()
    assert watching.step == 2
    assert set(load_run(tmp_path / "first")["gradient_tails"]["layer"]) == {"0.weight", "1.weight", "1.bias"}
    assert set(load_run(tmp_path / "second")["gradient_tails"]["layer"]) == {"6.weight", "6.bias"}
    assert steps_of(tmp_path / "first") == [0, 1, 2, 3]
    assert steps_of(tmp_path / "second") == [0, 1]


# Where scalars go


def test_loggers_of_several_kinds(tmp_path: Path) -> None:
    class Collects:
        def __init__(self) -> None:
            self.seen: list[tuple[int, set[str]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.seen.append((step, set(metrics)))

    model, collects = small_net(), Collects()
    optimizer = sgd(model)
    loggers = [collects, CSVLogger(tmp_path, name="", version="csv"), SummaryWriter(tmp_path / "board")]
    callbacks = [GradientTails(2), RelativeLoss(2, loss=batch_loss)]
    with watch(model, optimizer, *callbacks, dirpath=tmp_path, logger=loggers) as watching:
        train(model, optimizer, watching, steps=3)
    assert [step for step, _ in collects.seen] == [0, 0, 2, 2]
    assert "relative_loss/headroom" in collects.seen[1][1]
    assert "gradient/kurtosis/6.weight" in collects.seen[0][1]
    assert "gradient/kurtosis/6.weight" in (tmp_path / "csv" / "metrics.csv").read_text()
    [events] = (tmp_path / "board").iterdir()
    assert b"gradient/kurtosis/6.weight" in events.read_bytes()
    assert b"gradient/histogram/6.weight" in events.read_bytes()


# Nothing is changed


def run(folder: Path, optimizer: str, accumulate: int, watched: bool) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    model = small_net()
    chosen = sgd(model) if optimizer == "sgd" else torch.optim.AdamW(model.parameters(), lr=1e-2)
    if watched:
        with watch(model, chosen, *every_callback(), dirpath=folder) as watching:
            train(model, chosen, watching, accumulate=accumulate)
    else:
        train(model, chosen, accumulate=accumulate)
    return {
        "model": model.state_dict(),
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "optimizer": chosen.state_dict()["state"],
        "streams": (torch.rand(3), random.random(), np.random.rand()),
        "hooks": [len(h) for m in model.modules() for h in (m._forward_pre_hooks, m._forward_hooks)],
        "step hooks": (len(chosen._optimizer_step_pre_hooks), len(chosen._optimizer_step_post_hooks)),
    }


@pytest.mark.parametrize(("optimizer", "accumulate"), cells(["sgd", "adamw"], [1, 3], fast=[("sgd", 3), ("adamw", 1)]))
def test_a_loop_ends_bit_for_bit_as_without(tmp_path: Path, optimizer: str, accumulate: int) -> None:
    assert_equal(run(tmp_path, optimizer, accumulate, False), run(tmp_path, optimizer, accumulate, True))
    frames = load_run(tmp_path)
    for quantity in ("gradient_tails", "channel_moments", "relative_loss"):
        assert sorted(set(frames[quantity]["step"])) == list(range(STEPS))
    assert len(frames["divergence"]) == 0


def test_copies_of_the_model_are_not_watched(tmp_path: Path) -> None:
    model = small_net()
    optimizer = sgd(model)
    with watch(model, optimizer, ChannelMoments(1), dirpath=tmp_path) as watching:
        average = torch.optim.swa_utils.AveragedModel(model)
        torch.save(model, tmp_path / "model.pt")
        for batch in list(loader())[:3]:
            batch_loss(model, batch).backward()
            average.module.train()(torch.randn(9, 1, 8, 8))
            optimizer.step()
    assert watching.step == 3
    assert load_run(tmp_path)["channel_moments"]["count"].tolist() == [512] * 3
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    loaded.train()(torch.randn(2, 1, 8, 8))


# Leaving, and coming back


def test_an_exception_goes_on_and_what_was_measured_is_written(tmp_path: Path) -> None:
    model = small_net()
    optimizer = sgd(model)

    def fail(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watch(model, optimizer, *every_callback(), dirpath=tmp_path) as watching:
        train(model, optimizer, watching, before_step=fail)
    frames = load_run(tmp_path)
    for quantity in ("gradient_tails", "channel_moments", "relative_loss"):
        assert sorted(set(frames[quantity]["step"])) == [0, 1, 2]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    train(model, optimizer, steps=1)  # no longer watched
    assert watching.step == 3
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("along", ["gradient", "update"])
@pytest.mark.parametrize("fail_at", [1, 2, 5])
def test_an_exception_of_the_loss_leaves_model_and_optimizer_as_the_step_had_them(
    tmp_path: Path, along: str, fail_at: int
) -> None:
    def bits(model: nn.Module) -> list[Any]:
        return [{k: v.clone() for k, v in model.state_dict().items()}, [p.grad.clone() for p in model.parameters()]]

    model, calls, expected = small_net(), [], []
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.register_step_post_hook(lambda *_: expected.append(bits(model)))  # comes before that of the callback

    def loss(module: Any, batch: Any) -> Tensor:
        calls.append(1)
        module[1].running_mean.add_(1.0)
        torch.rand(3)
        if len(calls) == fail_at:
            raise RuntimeError("from the user's loss")
        return batch_loss(module, batch)

    watching = watch(model, optimizer, RelativeLoss(1, loss=loss, along=along), dirpath=tmp_path)
    with pytest.raises(RuntimeError, match="from the user's loss"), watching:
        train(model, optimizer, watching, before_step=lambda _: expected.append([*bits(model), torch.get_rng_state()]))
    assert len(calls) == fail_at
    assert len(expected) == (1 if along == "gradient" else 2)
    assert_equal(bits(model), expected[-1][:2])
    assert_equal(torch.get_rng_state(), expected[0][2])
    assert len(optimizer._optimizer_step_post_hooks) == 1  # the loop's own
    assert not optimizer._optimizer_step_pre_hooks
    steps = watching.step
    train(model, optimizer, steps=1)  # no longer watched
    assert watching.step == steps
    assert len(calls) == fail_at


def test_leaving_early_removes_all_hooks(tmp_path: Path) -> None:
    model = small_net()
    optimizer = sgd(model)
    with watch(model, optimizer, *every_callback(), dirpath=tmp_path):
        batch_loss(model, next(iter(loader())))  # and no step
        assert any(m._forward_hooks for m in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks


def test_entered_for_each_epoch_it_goes_on(tmp_path: Path) -> None:
    model = small_net()
    optimizer = sgd(model)
    watching = watch(model, optimizer, *every_callback(2), dirpath=tmp_path)
    for _ in range(3):
        with watching:
            train(model, optimizer, watching, steps=3)
        train(model, optimizer, steps=2)
    assert steps_of(tmp_path) == steps_of(tmp_path, "channel_moments") == [0, 2, 4, 6, 8]
    with watching, pytest.raises(RuntimeError, match="has been entered already"):
        watching.__enter__()


def test_a_continued_loop_continues_its_record(tmp_path: Path) -> None:
    def watching(**options: Any) -> Any:
        return watch(model, optimizer, *every_callback(2), dirpath=tmp_path, **options)

    model = small_net()
    optimizer = sgd(model)
    with watching() as first:
        train(model, optimizer, first, steps=5)
        torch.save(first.state_dict(), tmp_path / "state.pt")
        assert steps_of(tmp_path) == [0, 2, 4]  # a checkpoint holds no sample back
        train(model, optimizer, first, steps=4)  # lost
    second = watching()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with second:
        with pytest.raises(RuntimeError, match="before entering"):
            second.load_state_dict(first.state_dict())
        train(model, optimizer, second, steps=2)
    assert second.step == 7
    assert steps_of(tmp_path) == [0, 2, 4, 6]
    assert len(second.state_dict()["callbacks"][3][1]["recent"]) == 7
    with watching(start_step=7) as third:
        train(model, optimizer, third, steps=2)
    assert steps_of(tmp_path) == [0, 2, 4, 6, 8]
    assert load_run(tmp_path)["gradient_tails"].attrs["segments"] == 3
    other = watch(model, optimizer, Divergence(), dirpath=tmp_path)
    with pytest.raises(ValueError, match="the state is of the measurements GradientTails, .*; here are Divergence"):
        other.load_state_dict(first.state_dict())


# The documentation


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = [b for b in re.findall(r"^```py\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.M) if "normzoo.watch" in b]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, str(DOCS), "exec"), names)
    assert names["frames"].keys() == {"gradient_norm", "channel_moments", "divergence"}
    assert (tmp_path / "runs" / "mine").is_dir()


def test_it_is_a_public_name() -> None:
    assert normzoo.watch is watch
    assert "watch" in normzoo.__all__


def test_a_folder_of_its_own_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for n in range(2):
        model = nn.Linear(3, 2)
        optimizer = sgd(model)
        with normzoo.watch(model, optimizer) as watching:
            model(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()
        assert watching.dirpath == Path("normzoo_logs", f"version_{n}")
        assert len(normzoo.load_run(watching.dirpath)["gradient_tails"]) == 2
