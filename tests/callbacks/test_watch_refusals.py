"""What a watched loop is refused, and where."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callbacks_small import loader
from torch import nn
from watch_small import assert_equal, batch_loss, compiled_in_place, sgd, small_net, train

from normzoo import load_run, watch
from normzoo.callbacks import ChannelMoments, Divergence, GradientNoise, GradientTails, RelativeLoss
from normzoo.callbacks._run.loop import LoopRun


def refusal(model: Any = None, optimizer: Any = None, *callbacks: Any, **options: Any) -> Any:
    model = small_net() if model is None else model
    optimizer = sgd(model if isinstance(model, nn.Module) else small_net()) if optimizer is None else optimizer
    return watch(model, optimizer, *callbacks, **{"dirpath": "unused", **options})


def lookahead() -> Any:
    from timm.optim import Lookahead

    return Lookahead(sgd(small_net()))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ([sgd(small_net()), small_net()], {}, TypeError, "the model first, then the optimizer; swap them"),
        ([nn.Linear], {}, TypeError, "model must be a torch.nn.Module, not the class Linear; make an instance"),
        ([None, torch.optim.SGD], {}, TypeError, "Optimizer, not the class SGD; make an instance"),
        ([None, []], {}, ValueError, "optimizer must be an optimizer, or several different ones in a list"),
        ([None, [sgd(small_net())] * 2], {}, ValueError, "optimizer must be an optimizer, or several different ones"),
        ([None, [sgd(small_net()), nn.Linear]], {}, TypeError, "must be a torch.optim.Optimizer, not the class Linear"),
        ([None, sgd(small_net())], {}, ValueError, "the optimizer has no parameter of the model; make it from"),
        ([None, lookahead()], {}, ValueError, "Lookahead runs no step hooks; give the optimizer that it wraps"),
        ([None, None, GradientTails], {}, TypeError, "not the class GradientTails; make an instance"),
        (
            [None, None, [GradientTails()]],
            {},
            TypeError,
            "watch takes measurements one by one, such as GradientTails\\(\\), not a list",
        ),
        ([None, None, pl.Callback()], {}, TypeError, "not a Callback"),
        (
            [None, None, GradientNoise()],
            {},
            ValueError,
            "GradientNoise needs the gradients of single backward passes; a plain loop",
        ),
        (
            [None, None, GradientTails(of=["noise"])],
            {},
            ValueError,
            "GradientTails needs the gradients of single backward passes; a plain loop",
        ),
        ([None, None, RelativeLoss()], {}, ValueError, "pass loss=, a function of \\(module, batch\\), and call watch"),
        ([None, None, *[GradientTails()] * 2], {}, ValueError, "a measurement was given twice"),
        ([nn.DataParallel(small_net())], {}, ValueError, "use DistributedDataParallel"),
        ([], {"start_step": -1}, ValueError, "start_step must be a whole number of at least 0, not -1"),
        ([], {"start_step": 1.0}, ValueError, "start_step must be a whole number of at least 0, not 1.0"),
        ([], {"logger": True}, TypeError, "logger must have log_metrics\\(metrics, step\\)"),
    ],
)
def test_wrong_arguments(arguments: list[Any], options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        refusal(*arguments, **options)


def test_models_of_which_a_rank_holds_flat_parts_are_refused() -> None:
    class FullyShardedDataParallel(nn.Linear): ...

    with pytest.raises(
        ValueError, match="DistributedDataParallel and fully_shard; under FullyShardedDataParallel a rank"
    ):
        refusal(nn.Sequential(FullyShardedDataParallel(2, 2)))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (GradientTails(parameters="conv*"), "no parameter matches 'conv\\*'; there are 0.weight"),
        (ChannelMoments(sites="conv*"), "no module matches 'conv\\*'"),
    ],
)
def test_what_a_callback_refuses_at_setup_is_refused_on_entering(tmp_path: Path, callback: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), refusal(None, None, callback, dirpath=tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_moments_of_a_model_compiled_in_place_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"calls of a model that was compiled in place, by model\.compile"),
        refusal(compiled_in_place(), None, ChannelMoments(), dirpath=tmp_path),
    ):
        pass


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (Divergence(), "call watching.loss\\(loss\\) before each optimizer.step"),
        (RelativeLoss(2, loss=batch_loss), "call watching.batch\\(batch\\) before each"),
        (ChannelMoments(), "there was none before the first step; call the model that was given to watch"),
    ],
)
def test_what_the_loop_should_have_told_is_missed_at_the_step(tmp_path: Path, callback: Any, message: str) -> None:
    model = small_net()
    optimizer = sgd(model)
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message), watch(model, optimizer, callback, dirpath=tmp_path):
        optimizer.step()
    assert_equal(weights, model.state_dict())


def test_a_batch_is_only_missed_when_it_is_due(tmp_path: Path) -> None:
    model = small_net()
    optimizer = sgd(model)
    with watch(model, optimizer, RelativeLoss(2, loss=batch_loss), dirpath=tmp_path, start_step=1):
        train(model, optimizer, steps=1)
        with pytest.raises(ValueError, match="call watching.batch"):
            train(model, optimizer, steps=1)


@pytest.mark.parametrize("name", ["loss", "batch"])
def test_telling_outside_of_the_block(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"watching.{name}\\(...\\) is for inside of the with block"):
        getattr(refusal(), name)(torch.tensor(1.0))


def test_a_loss_of_several_values(tmp_path: Path) -> None:
    with refusal(dirpath=tmp_path) as watching, pytest.raises(ValueError, match="one value, not \\(8,\\)"):
        watching.loss(torch.zeros(8))


def test_closures_are_refused(tmp_path: Path) -> None:
    model = small_net()
    optimizer = torch.optim.LBFGS(model.parameters())
    with watch(model, optimizer, dirpath=tmp_path), pytest.raises(ValueError, match="without a closure"):
        optimizer.step(lambda: batch_loss(model, next(iter(loader()))))


def test_an_optimizer_that_unscales_by_itself_needs_the_gradients_unscaled_before(tmp_path: Path) -> None:
    def loop(folder: Path, unscale: bool, *callbacks: Any) -> None:
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with watch(model, optimizer, *callbacks, dirpath=folder):
            scaler.scale(batch_loss(model, next(iter(loader())))).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
        if unscale:
            l2 = load_run(folder)["gradient_tails"].set_index("layer")["l2"]["6.weight"]
            assert l2 == pytest.approx(model[6].weight.grad.norm().item(), rel=1e-5)

    with pytest.raises(ValueError, match="call scaler.unscale_\\(optimizer\\) before scaler.step\\(optimizer\\)"):
        loop(tmp_path / "a", False, GradientTails())
    loop(tmp_path / "b", True, GradientTails())
    loop(tmp_path / "c", False, ChannelMoments())


def test_a_plain_loop_says_that_it_has_no_training_step() -> None:
    model = small_net()
    with pytest.raises(ValueError, match=r"no training_step to evaluate in a plain loop; call run\.module, or refuse"):
        LoopRun(model, [sgd(model)], [], 0).training_step(None, 0)
