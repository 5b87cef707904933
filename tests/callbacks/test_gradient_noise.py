"""GradientNoise against each micro-batch's gradient by autograd, in float64."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from callbacks_small import Ops, SmallNet, images, loader, trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from normzoo import load_run
from normzoo.callbacks import GradientNoise
from normzoo.callbacks._run.gradients import batch_size
from normzoo.functional.noise import gradient_noise, noise_scale, update_noise_bound


class Net(SmallNet):
    """Without dropout, so that a gradient can be computed again."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr=lr)
        self.net[3] = nn.Identity()


class Fused(Net):
    """Whose optimizer undoes the loss scale itself, so that Lightning does not."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, fused=True)


class Gradients(pl.Callback):
    """The gradient of each micro-batch of each step by autograd on a copy, flat and float64."""

    def __init__(self) -> None:
        self.seen: dict[int, list[Tensor]] = {}
        self.sizes: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        net = copy.deepcopy(pl_module.net).double()
        loss = F.cross_entropy(net(batch[0].double()), batch[1])
        grads = torch.autograd.grad(loss, list(net.parameters()))
        self.seen.setdefault(trainer.global_step, []).append(torch.cat([g.flatten() for g in grads]))
        self.sizes.setdefault(trainer.global_step, []).append(len(batch[1]))


def rows(folder: Path) -> list[dict[str, Any]]:
    return load_run(folder / "log")["gradient_noise"].to_dict("records")


def test_the_record_agrees_with_the_gradients_of_micro_batches(tmp_path: Path) -> None:
    gradients = Gradients()
    callback = GradientNoise(2, decay=None, population=160, factor="(N-b)/(N-1)")
    options = {"accumulate_grad_batches": 4, "precision": "64-true", "gradient_clip_val": 1e-3, "max_steps": 5}
    trainer(str(tmp_path), callbacks=[gradients, callback], **options).fit(Net(), loader())
    found = rows(tmp_path)
    assert [r["step"] for r in found] == [0, 2, 4]
    for i, row in enumerate(found):
        g = torch.stack(gradients.seen[row["step"]])
        assert (row["gradients"], row["small_batch"], row["big_batch"]) == (4, 8.0, 32.0)
        small, big = g.square().sum(1).mean().item(), g.mean(0).square().sum().item()
        assert (row["small_sq"], row["big_sq"]) == pytest.approx((small, big), rel=1e-10)
        noise = noise_scale(row["small_sq"], row["big_sq"], 8, 32)
        assert (row["gradient_sq"], row["trace"], row["scale"]) == tuple(v.item() for v in noise)
        assert row["trace"] == pytest.approx(gradient_noise(g, batch_size=8, unbiased=True).item(), rel=1e-9)
        assert row["lr"] == 0.1
        assert row["bound"] == update_noise_bound(row["trace"], 0.1, 32, 160, "(N-b)/(N-1)").item()
        assert row["bound"] == pytest.approx(0.01 * row["trace"] / 32 * 128 / 159)
        assert row["factor"] == "(N-b)/(N-1)"
        for column in ("gradient_sq", "trace"):
            mean = sum(r[column] for r in found[: i + 1]) / (i + 1)
            assert row[f"mean_{column}"] == pytest.approx(mean, rel=1e-12)
        assert row["mean_scale"] == row["mean_trace"] / row["mean_gradient_sq"]


def test_uneven_batches_and_a_short_last_step_of_an_epoch(tmp_path: Path) -> None:
    """22 samples in batches of 4 are 4 4 4 4 4 2: a step of four, and one of two, the last of which is smaller."""
    gradients = Gradients()
    options = {"accumulate_grad_batches": 4, "precision": "64-true", "max_steps": 4}
    data = DataLoader(images(22), batch_size=4)
    trainer(str(tmp_path), callbacks=[gradients, GradientNoise(1)], **options).fit(Net(), data)
    found = rows(tmp_path)
    assert [r["gradients"] for r in found] == [4, 2, 4, 2]
    assert gradients.sizes[1] == [4, 2]
    for row in found:
        g, sizes = torch.stack(gradients.seen[row["step"]]), gradients.sizes[row["step"]]
        small, big = g.square().sum(1).mean().item(), g.mean(0).square().sum().item()
        assert (row["small_sq"], row["big_sq"]) == pytest.approx((small, big), rel=1e-10)
        harmonic = len(sizes) / sum(1 / b for b in sizes)
        assert (row["small_batch"], row["big_batch"]) == pytest.approx((harmonic, harmonic * len(sizes)))
        noise = noise_scale(small, big, harmonic, harmonic * len(sizes))
        assert (row["gradient_sq"], row["trace"]) == pytest.approx((noise.gradient_sq.item(), noise.trace.item()))


def test_estimates_are_unbiased_also_if_batches_differ() -> None:
    """Over draws of gradients G + noise/sqrt(b), combined with weights 1/K."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, 4.0, 16.0], dtype=torch.float64)
    draws = torch.randn(20000, 3, 10, generator=generator, dtype=torch.float64) / sizes.sqrt()[:, None] + 0.5
    small, big = draws.square().sum(2).mean().item(), draws.mean(1).square().sum(1).mean().item()
    harmonic = 3 / (1 / sizes).sum().item()
    row = GradientNoise().estimate(0.1, small, big, 3, harmonic, 3 * harmonic, 3 * harmonic)
    assert row["trace"] == pytest.approx(10.0, rel=0.02)
    assert row["gradient_sq"] == pytest.approx(2.5, rel=0.02)


def test_an_unscaled_gradient_under_a_grad_scaler(tmp_path: Path) -> None:
    """In half precision with a loss scale of 2^10, the figures are those without, up to rounding."""
    found = {}
    for name in ("float32", "float16", "fused"):
        pl.seed_everything(1, verbose=False)
        options: dict[str, Any] = {"accumulate_grad_batches": 4, "max_steps": 3}
        module = (Fused if name == "fused" else Net)(lr=1e-3)
        if name != "float32":
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        trainer(str(tmp_path / name), callbacks=[GradientNoise(1)], **options).fit(module, loader())
        found[name] = rows(tmp_path / name)
    for plain, *others in zip(*found.values(), strict=True):
        for other in others:
            for column in ("small_sq", "big_sq", "trace"):
                assert other[column] == pytest.approx(plain[column], rel=2e-2), column


def test_a_step_that_is_not_finite_leaves_the_running_means(tmp_path: Path) -> None:
    class Overflows(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * math.inf if batch_idx == 3 else loss

    options = {"accumulate_grad_batches": 2, "max_steps": 3}
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    trainer(str(tmp_path), callbacks=[GradientNoise(1)], plugins=[plugin], **options).fit(Overflows(), loader())
    finite, lost, after = rows(tmp_path)
    assert not math.isfinite(lost["trace"])
    assert lost["mean_trace"] == finite["mean_trace"] == finite["trace"]
    assert math.isfinite(after["mean_scale"])


def test_running_means_forget_and_resume_without_a_seam(tmp_path: Path) -> None:
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 4 and trainer.fit_loop.batch_idx % 2:  # not amid a step
                trainer.save_checkpoint(tmp_path / "at.ckpt")

    def run(name: str, steps: int, **options: Any) -> None:
        callbacks = [GradientNoise(1, decay=0.8, dirpath=str(tmp_path / name / "log")), Saves()]
        settings = {"max_steps": steps, "logger": False, "accumulate_grad_batches": 2, "precision": "64-true"}
        data = DataLoader(images(160), batch_size=16)
        trainer(str(tmp_path), callbacks=callbacks, **settings).fit(Net(), data, **options)

    pl.seed_everything(1, verbose=False)
    run("resumed", 5)
    pl.seed_everything(1, verbose=False)
    run("whole", 8)
    with pytest.warns(UserWarning, match="not resumable"):
        run("resumed", 8, ckpt_path=tmp_path / "at.ckpt", weights_only=False)
    whole, resumed = rows(tmp_path / "whole"), rows(tmp_path / "resumed")
    assert [r["step"] for r in whole] == [r["step"] for r in resumed] == list(range(8))
    for i, row in enumerate(whole):
        weights = [0.8 ** (i - j) for j in range(i + 1)]
        mean = sum(w * r["trace"] for w, r in zip(weights, whole, strict=False)) / sum(weights)
        assert row["mean_trace"] == pytest.approx(mean)
    traces = [[w for r in found for w in (r["trace"], r["mean_trace"])] for found in (whole, resumed)]
    assert traces[0][:8] == traces[1][:8]
    assert rows(tmp_path / "resumed")[4]["mean_trace"] == pytest.approx(
        (resumed[4]["trace"] + sum(0.8 ** (4 - j) * whole[j]["trace"] for j in range(4)))
        / sum(0.8**j for j in range(5))
    )


def hooks(module: nn.Module) -> int:
    return sum(len(p._backward_hooks or ()) for p in module.parameters())


def test_hooks_are_there_during_sampled_backward_passes_only(tmp_path: Path) -> None:
    during = []

    class Counts(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert hooks(self) == 0
            return super().training_step(batch, batch_idx)

        def backward(self, loss: Tensor) -> None:
            during.append(hooks(self))
            if len(during) == 5:
                raise RuntimeError("from the user's backward")
            super().backward(loss)

    module = Counts()
    with pytest.raises(RuntimeError, match="from the user's backward"):
        trainer(str(tmp_path), callbacks=[GradientNoise(2)], accumulate_grad_batches=2).fit(module, loader())
    assert during == [5, 5, 0, 0, 5]
    assert hooks(module) == 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_networks_are_measured_alike(tmp_path: Path, backend: str) -> None:
    found = []
    for name in ("plain", "compiled"):
        pl.seed_everything(1, verbose=False)
        module = Net()
        if name == "compiled":
            module.net = torch.compile(module.net, backend=backend)
        options = {"max_steps": 3, "accumulate_grad_batches": 2}
        trainer(str(tmp_path / name), callbacks=[GradientNoise(2)], **options).fit(module, loader())
        found.append(rows(tmp_path / name))
    for a, b in zip(*found, strict=True):
        assert a["trace"] == pytest.approx(b["trace"], rel=1e-4)
        assert a["big_sq"] == pytest.approx(b["big_sq"], rel=1e-4)


@pytest.mark.parametrize("split", [None, 2])
def test_nothing_passes_between_host_and_device_before_a_step(tmp_path: Path, split: int | None) -> None:
    """Of what on a GPU would wait for it: reading a value, and making a tensor from one."""

    class Spied(GradientNoise):
        def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
            with Ops() as ops:
                super().on_before_optimizer_step(trainer, *args)
            if trainer.global_step == 0:  # later ones read what the earlier have left
                found.append(ops.seen)

    found: list[set[str]] = []
    options = {"accumulate_grad_batches": 2, "max_steps": 2}
    trainer(str(tmp_path), callbacks=[Spied(1, split=split)], **options).fit(Net(), loader())
    assert "stack" in found[0] or "cat" in found[0]
    assert not found[0] & {"_local_scalar_dense", "lift_fresh"}, found[0]


def test_a_sparse_gradient(tmp_path: Path) -> None:
    class Embeds(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 3, sparse=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.table(batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Sparse(pl.Callback):
        norms: list[float] = []  # noqa: RUF012

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.norms.append(pl_module.table.weight.grad.to_dense().square().sum().item())

    options = {"accumulate_grad_batches": 2, "max_steps": 2}
    trainer(str(tmp_path), callbacks=[Sparse(), GradientNoise(1)], **options).fit(Embeds(), loader())
    assert [r["big_sq"] for r in rows(tmp_path)] == pytest.approx(Sparse.norms, rel=1e-5)


def test_gradients_in_parts_are_refused(tmp_path: Path) -> None:
    class Twice(pl.LightningModule):
        """One parameter in two reentrant segments."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0].requires_grad_()
            for _ in range(2):
                x = checkpoint(self.linear, x, use_reentrant=True)
            return x.square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Twice()
    with pytest.raises(ValueError, match="a parameter got its gradient in several parts .* use_reentrant=False"):
        trainer(str(tmp_path), callbacks=[GradientNoise(1)], accumulate_grad_batches=2).fit(module, loader())
    assert hooks(module) == 0


def test_accumulation_that_begins_later(tmp_path: Path) -> None:
    """Of epochs of four batches, the second has steps of two."""
    callbacks = [GradientAccumulationScheduler({1: 2}), GradientNoise(1)]
    trainer(str(tmp_path), callbacks=callbacks, max_epochs=2, max_steps=-1).fit(Net(), loader(32))
    assert [(r["step"], r["gradients"]) for r in rows(tmp_path)] == [(4, 2), (5, 2)]


def test_what_cannot_be_measured_is_refused_at_setup(tmp_path: Path) -> None:
    message = (
        "at least two micro-batches or ranks, and a step here has one; set acc.*, or pass split=2, which evaluates"
    )
    with pytest.raises(ValueError, match=message):
        trainer(str(tmp_path), callbacks=[GradientNoise()]).fit(Net(), loader())
    callbacks = [GradientAccumulationScheduler({1: 1}), GradientNoise()]
    with pytest.raises(ValueError, match=message):
        trainer(str(tmp_path), callbacks=callbacks).fit(Net(), loader())
    manual = Net()
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="it supports automatic optimization only"):
        trainer(str(tmp_path), callbacks=[GradientNoise()]).fit(manual, loader())


def test_the_number_of_samples() -> None:
    x = torch.zeros(5, 3)
    assert [batch_size(b) for b in (x, [x, None], {"a": "text", "b": (x,)}, [], "text", torch.zeros(()), [3, x])] == [
        *[5, 5, 5],
        *[None, None, None],
        5,
    ]
    with pytest.raises(ValueError, match="the number of samples in a batch, and found None in a list; pass samples="):
        GradientNoise()._count([])
    assert GradientNoise(samples=lambda batch: 7)._count([]) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
        ({"decay": 1.0}, "decay must be between 0 and 1, not 1.0"),
        ({"population": 0}, "population must be at least 1, not 0"),
        ({"split": 1}, "split must be a number of parts from 2, a function of the batch, or None, not 1"),
        ({"split": 2.0}, "split must be a number of parts from 2, a function of the batch, or None, not 2.0"),
        ({"factor": "N"}, r"factor must be one of '\(N-b\)/\(N-1\)', '\(N-b\)/N', '1', not 'N'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientNoise(**options)


@pytest.mark.parametrize("options", [{"decay": "0.9"}, {"decay": True}, {"population": "many"}, {"population": 0}])
def test_numbers_are_checked(options: dict[str, Any]) -> None:
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name} must be .*, not {value!r}"):
        GradientNoise(**options)
