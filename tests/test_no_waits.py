"""On a GPU nothing waits for the host: layers and measurements on tensors that claim to be there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import READS, BlockingCopyError, fake_cuda, no_waiting, on_gpu
from norm_cases import CASES, CHANNELS
from schemas import MEASUREMENTS
from torch import Tensor, nn

from normzoo import watch
from normzoo.callbacks import (
    ChannelMoments,
    Divergence,
    GradientNoise,
    GradientNorm,
    GradientTails,
    ParameterNorms,
    RelativeLoss,
)
from normzoo.callbacks import divergence as divergence_module
from normzoo.callbacks._run import ranks
from normzoo.callbacks.measurement import Measurement, Step
from normzoo.callbacks.sharpness import _Matrix, _rule, _trainable
from normzoo.functional import divisive_norm, lanczos, power_norm

# Measurements that differentiate, which needs the driver
BACKWARD = frozenset({"class_gradients", "gradient_predictiveness", "gradient_sums", "sharpness"})


@pytest.fixture(autouse=True)
def statistics_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's kernel for the moments of a batch has no fake one; it waits for nothing."""

    def moments(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return on_gpu(x.shape[1]), on_gpu(x.shape[1])

    monkeypatch.setattr(torch, "batch_norm_update_stats", moments)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layer_waits_for_nothing(case: Any, training: bool) -> None:
    with fake_cuda():
        layer = case.factory(CHANNELS, device="cuda").train(training)
        x = on_gpu(4, CHANNELS, 8, 8, requires_grad=True)
        with no_waiting():
            assert layer(x).device.type == "cuda"


def test_a_number_in_the_place_of_a_tensor_waits_for_nothing() -> None:
    with fake_cuda():
        x, ones = on_gpu(4, CHANNELS, 8, 8), on_gpu(CHANNELS)
        with no_waiting():
            power_norm(x, ones, ones, batches=3, training=True)
            divisive_norm(x, 0.5)


# Measurements


class Sent:
    """Stands in for what carries values to the host, which needs the driver: they are never read."""

    sent = 0

    def __init__(self, value: Tensor, reduce: str | None = None) -> None:
        assert value.device.type == "cuda"
        Sent.sent += 1

    def read(self) -> Tensor:
        raise AssertionError("a value is read in a step")


@pytest.fixture(autouse=True)
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "Reading", Sent)
    monkeypatch.setattr(divergence_module, "Reading", Sent)
    monkeypatch.setattr(ranks, "_to_device", lambda value, device: value.to(device, non_blocking=True))  # is pinned
    monkeypatch.setattr(Measurement, "flush", lambda self, run: None)
    monkeypatch.setattr(Sent, "sent", 0)


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3, device="cuda"),
            nn.BatchNorm2d(4, device="cuda"),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * 16, 5, device="cuda"),
        )


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


IN_A_LOOP: dict[str, Callable[[], Measurement]] = {
    "gradient_tails": lambda: GradientTails(1),
    "gradient_tails-update": lambda: GradientTails(1, of=["gradient", "update"]),
    "gradient_tails-budget": lambda: GradientTails(1, budget=64),
    "gradient_norm": lambda: GradientNorm(1, layers=1),
    "parameter_norms": lambda: ParameterNorms(1),
    "channel_moments": lambda: ChannelMoments(1, where="both"),
    "relative_loss": lambda: RelativeLoss(1, loss=loss_of),
    "divergence": lambda: Divergence(recorder=False),  # which copies random streams, and needs the driver for it
}


def step_of_a_loop(folder: Path, measurement: Measurement, steps: int = 2) -> None:
    """Steps of a plain loop on a GPU that is not there; the gradients are made up."""
    with fake_cuda():
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with watch(model, optimizer, measurement, dirpath=folder) as watching:
            if isinstance(measurement, ChannelMoments):  # whose first sample agrees on the numbers of channels
                measurement._channels = {(n, w): 4 for n in ("1",) for w in ("input", "output")}
            for _ in range(steps):
                batch = on_gpu(8, 3, 6, 6)
                with no_waiting():
                    watching.batch(batch)
                    watching.loss(loss_of(model, batch))
                for p in model.parameters():
                    p.grad = torch.randn_like(p)
                with no_waiting():
                    optimizer.step()


@pytest.mark.parametrize("name", IN_A_LOOP)
def test_a_measurement_waits_for_nothing(tmp_path: Path, name: str) -> None:
    step_of_a_loop(tmp_path, IN_A_LOOP[name]())
    assert Sent.sent >= 2


def test_the_sums_of_gradient_noise_wait_for_nothing() -> None:
    class Facts:
        device, accumulation, scaler, step = torch.device("cuda"), 2, None, 0

    with fake_cuda():
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        measurement = GradientNoise(1)
        step = Step(Facts(), 0)  # type: ignore[arg-type]
        step.optimizer, step.batch = optimizer, on_gpu(8, 3, 6, 6)
        step.parameters = dict(enumerate(model.parameters()))
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        with no_waiting():
            for _ in range(2):
                measurement.before_batch(step)
                for name, p in step.parameters.items():
                    measurement.gradient(step, name, torch.randn_like(p))
                measurement.after_backward(step)
            measurement.measure(step)
    assert Sent.sent == 1


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_the_recurrence_and_the_rule_of_sharpness_wait_for_nothing(kind: Any) -> None:
    with fake_cuda():
        model = Net()
        groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(model.parameters())]
        optimizer = kind(groups, lr=0.1, weight_decay=0.1)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        with no_waiting():
            rule = _rule(optimizer, _trainable(optimizer))
            assert rule is not None
            assert isinstance(rule.matrix, _Matrix)
            size = len(rule.matrix.root)
            found = lanczos(partial(rule.matrix.product, torch.mul(2, on_gpu(size)).mul), on_gpu(size), 3)
        assert [t.device.type for t in found] == ["cuda", "cuda"]


def test_every_measurement_is_tried() -> None:
    tried = {name.partition("-")[0] for name in IN_A_LOOP} | {"gradient_noise"}
    assert tried | BACKWARD == MEASUREMENTS.keys()
    assert not tried & BACKWARD


# Waiting is seen


class Planted(Measurement):
    name = "planted"

    def __init__(self, wait: Callable[[Tensor], Any]) -> None:
        self.wait = wait
        super().__init__(1)

    def measure(self, step: Step) -> None:
        self.wait(next(iter(step.parameters.values())).detach())

    def rows(self, sample: Any, values: Any) -> list[dict[str, Any]]:
        return []


@pytest.mark.parametrize(
    ("wait", "error"),
    [
        (lambda p: p.sum().item(), READS),
        (lambda p: bool(p.sum() > 0), READS),
        (lambda p: p.nonzero(), READS),
        (lambda p: p[p > 0], READS),
        (lambda p: p.cpu(), BlockingCopyError),
        (lambda p: p.to("cpu"), BlockingCopyError),
        (lambda p: torch.zeros(p.shape).copy_(p), BlockingCopyError),
        (lambda p: torch.tensor([1.0, 2.0], device=p.device), BlockingCopyError),
        (lambda p: torch.tensor(1.0, device=p.device), BlockingCopyError),
        (lambda p: p.new_tensor([1.0]), BlockingCopyError),
        (lambda p: p[[0, 1]], BlockingCopyError),
    ],
    ids=["item", "bool", "nonzero", "mask", "cpu", "to", "copy_", "tensor", "number", "new_tensor", "index"],
)
def test_waiting_is_seen(tmp_path: Path, wait: Callable[[Tensor], Any], error: Any) -> None:
    with pytest.raises(error):
        step_of_a_loop(tmp_path, Planted(wait))


def test_what_does_not_wait_is_let_be(tmp_path: Path) -> None:
    def harmless(p: Tensor) -> None:
        p.to("cpu", non_blocking=True)
        p + torch.tensor(2.0)
        torch.full((), 3.0, device=p.device)
        torch.zeros(p.shape).copy_(p, non_blocking=True)

    step_of_a_loop(tmp_path, Planted(harmless))
