"""GradientNoise of parts of a batch, against each part's gradient by autograd, in float64."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from callbacks_small import SmallNet, images, loader, trainer
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from normzoo import load_run
from normzoo.callbacks import GradientNoise
from normzoo.callbacks._run.gradients import batch_size
from normzoo.callbacks._run.parts import cut
from normzoo.functional.noise import gradient_noise, noise_scale, update_noise_bound


class Net(SmallNet):
    """Without dropout, so that a gradient can be computed again."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr=lr)
        self.net[3] = nn.Identity()


class Gradients(pl.Callback):
    """The gradient of each part of each micro-batch of each step by autograd on a copy, flat and float64."""

    def __init__(self, parts: int) -> None:
        self.parts = parts
        self.seen: dict[int, list[Tensor]] = {}
        self.sizes: dict[int, list[list[int]]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        found, sizes, n = [], [], len(batch[1])
        for i in range(self.parts):
            part = slice(n * i // self.parts, n * (i + 1) // self.parts)
            net = copy.deepcopy(pl_module.net).double()
            loss = F.cross_entropy(net(batch[0][part].double()), batch[1][part])
            grads = torch.autograd.grad(loss, list(net.parameters()))
            found.append(torch.cat([g.flatten() for g in grads]))
            sizes.append(len(batch[1][part]))
        self.seen.setdefault(trainer.global_step, []).append(torch.stack(found))
        self.sizes.setdefault(trainer.global_step, []).append(sizes)


def rows(folder: Path) -> list[dict[str, Any]]:
    return load_run(folder / "log")["gradient_noise"].to_dict("records")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("by", ["number", "function"])
def test_the_record_agrees_with_the_gradients_of_parts(tmp_path: Path, accumulate: int, by: str) -> None:
    gradients = Gradients(4)
    split: Any = 4 if by == "number" else lambda batch: list(zip(*(t.chunk(4) for t in batch), strict=True))
    callback = GradientNoise(2, split=split, population=160)
    options = {"accumulate_grad_batches": accumulate, "precision": "64-true", "max_steps": 5}
    trainer(str(tmp_path), callbacks=[gradients, callback], **options).fit(Net(), loader())
    assert [r["step"] for r in rows(tmp_path)] == [0, 2, 4]
    for row in rows(tmp_path):
        g = torch.stack(gradients.seen[row["step"]])  # (micro-batch, part, value)
        assert (row["gradients"], row["small_batch"], row["big_batch"]) == (4 * accumulate, 2.0, 8.0)
        small, big = g.square().sum(2).mean().item(), g.mean(1).square().sum(1).mean().item()
        assert (row["small_sq"], row["big_sq"]) == pytest.approx((small, big), rel=1e-10)
        assert row["trace"] == pytest.approx(noise_scale(small, big, 2, 8).trace.item(), rel=1e-9)
        of_each = [gradient_noise(parts, batch_size=2, unbiased=True).item() for parts in g]
        assert row["trace"] == pytest.approx(sum(of_each) / accumulate, rel=1e-9)
        # The step's gradient is the mean of whole micro-batches'
        assert row["bound"] == update_noise_bound(row["trace"], 0.1, 8 * accumulate, 160, "(N-b)/N").item()


def test_uneven_parts_and_a_batch_too_small_to_split(tmp_path: Path) -> None:
    """13 samples in batches of 5 are 5 5 3: parts of 1 1 1 2 twice, and none of the last."""
    gradients = Gradients(4)
    options = {"accumulate_grad_batches": 3, "precision": "64-true", "max_steps": 2}
    data = DataLoader(images(13), batch_size=5)
    trainer(str(tmp_path), callbacks=[gradients, GradientNoise(1, split=4)], **options).fit(Net(), data)
    assert gradients.sizes[0] == [[1, 1, 1, 2], [1, 1, 1, 2], [0, 1, 1, 1]]
    for row in rows(tmp_path):
        g = torch.stack(gradients.seen[row["step"]][:2])
        small, big = g.square().sum(2).mean().item(), g.mean(1).square().sum(1).mean().item()
        assert row["gradients"] == 8
        assert (row["small_batch"], row["big_batch"]) == pytest.approx((4 / 3.5, 16 / 3.5))
        assert row["bound"] == update_noise_bound(row["trace"], 0.1, 10).item()
        assert (row["small_sq"], row["big_sq"]) == pytest.approx((small, big), rel=1e-10)


def test_micro_batches_in_different_numbers_of_parts_are_weighed(tmp_path: Path) -> None:
    """By a function that makes two parts of some and three of others: the estimates stay those of their norms."""
    generator = torch.Generator().manual_seed(0)

    class Samples(pl.LightningModule):
        """Whose gradient is the mean over a batch's samples, of 10 values with mean 0.5 and variance 1."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(10, dtype=torch.float64))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (batch[0] @ self.weight).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    def split(batch: Any) -> list[Any]:
        x = batch[0]
        return [[x[:1]], [x[1:6]]] if batch[0][0, 0] > 0.5 else [[x[:1]], [x[1:3]], [x[3:]]]

    x = torch.randn(12_000, 10, generator=generator, dtype=torch.float64) + 0.5
    options = {"accumulate_grad_batches": 500, "max_steps": 1}
    callback = GradientNoise(1, split=split)
    trainer(str(tmp_path), callbacks=[callback], **options).fit(Samples(), DataLoader(TensorDataset(x), batch_size=6))
    [row] = rows(tmp_path)
    assert row["trace"] == pytest.approx(10.0, rel=0.05)
    assert row["gradient_sq"] == pytest.approx(2.5, rel=0.1)


def test_parts_draw_random_numbers_of_their_own(tmp_path: Path) -> None:
    """The same sample throughout a batch: gradients differ by dropout alone."""
    x, y = images(1).tensors
    data = DataLoader(TensorDataset(x.expand(64, -1, -1, -1), y.expand(64)), batch_size=8)
    for name, module in (("dropout", SmallNet()), ("none", Net())):
        module.double()
        options = {"precision": "64-true", "max_steps": 2}
        trainer(str(tmp_path / name), callbacks=[GradientNoise(1, split=2)], **options).fit(module, data)
    assert all(r["trace"] > 0.1 * r["small_sq"] for r in rows(tmp_path / "dropout"))
    assert all(abs(r["trace"]) < 1e-12 for r in rows(tmp_path / "none"))


def test_neither_grad_nor_what_waits_for_it_takes_notice(tmp_path: Path) -> None:
    calls: list[int] = []
    left: list[Tensor] = []

    class Watched(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            assert calls == [0] * batch_idx  # one for each backward pass of the run
            now = [p.grad for p in self.parameters()]
            assert all(g is None for g in now) if batch_idx == 0 else all(map(torch.equal, now, left))

        def on_train_batch_end(self, *args: Any) -> None:
            left[:] = [p.grad.clone() for p in self.parameters()]

    module = Watched()
    module.net[6].weight.register_post_accumulate_grad_hook(lambda p: calls.append(0))
    trainer(str(tmp_path), callbacks=[GradientNoise(1, split=2)], max_steps=3).fit(module, loader())
    assert len(calls) == 3
    assert module.calls == 3
    assert len(module.seen) == 3


def test_a_short_batch_with_a_part_of_one_sample_is_left_out(tmp_path: Path) -> None:
    """Batch normalization of one value for each channel is an error, and the run alone would go on."""

    class Flat(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    options = {"max_epochs": 1, "max_steps": -1}
    data = DataLoader(images(19), batch_size=8)
    trainer(str(tmp_path / "a"), callbacks=[GradientNoise(1, split=2)], **options).fit(Flat(), data)
    assert [r["step"] for r in rows(tmp_path / "a")] == [0, 1]
    for samples in (8, 2):
        data = DataLoader(images(19), batch_size=samples, drop_last=True)
        message = (
            rf"^GradientNoise\(split=...\) evaluated a part of one sample, of a batch of {samples}; .* take larger "
            r"batches or fewer parts, or leave out split \(Expected more than 1 value per channel"
        )
        with pytest.raises(ValueError, match=message) as caught:
            trainer(str(tmp_path / f"b{samples}"), callbacks=[GradientNoise(1, split=samples)], **options).fit(
                Flat(), data
            )
        note = f"Raised by part 1 of {samples} of a batch, which GradientNoise(split=...) tried"
        assert caught.value.__notes__ == [note]


def test_an_error_of_larger_parts_is_the_modules_own(tmp_path: Path) -> None:
    class Fails(SmallNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if len(batch[0]) < 8:
                raise ValueError("as it was")
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="^as it was") as caught:
        trainer(str(tmp_path), callbacks=[GradientNoise(1, split=2)]).fit(Fails(), loader())
    assert caught.value.__notes__ == ["Raised by part 1 of 2 of a batch, which GradientNoise(split=...) tried"]


def test_batches_too_small_to_split_are_told_of_once(tmp_path: Path) -> None:
    fitted = trainer(str(tmp_path), callbacks=[GradientNoise(1, split=3)], max_steps=4)
    message = r"GradientNoise\(split=3\) leaves out batches of fewer than 3 samples, and the first one sampled has 2; "
    with pytest.warns(UserWarning, match=message) as told:
        fitted.fit(SmallNet(), loader(batch_size=2))
    assert len([w for w in told if "GradientNoise" in str(w.message)]) == 1
    assert rows(tmp_path) == []


def test_every_part_sees_the_module_as_it_is(tmp_path: Path) -> None:
    """What a part's step changes, here a centre that moves with each batch, is no part of the next one's."""

    class Centred(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("centre", torch.zeros(4))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.net(batch[0])
            loss = F.cross_entropy(logits - self.centre, batch[1])
            self.centre += logits.detach().mean(0)
            return loss

    pl.seed_everything(1, verbose=False)
    module = Centred().double()
    first = copy.deepcopy(module)
    options = {"max_steps": 1, "precision": "64-true"}
    trainer(str(tmp_path / "c"), callbacks=[GradientNoise(1, split=2)], **options).fit(module, loader())
    x, y = next(iter(loader()))
    grads = []
    for part in (slice(0, 4), slice(4, 8)):
        loss = F.cross_entropy(first.net(x[part].double()), y[part])  # the centre is still at zero
        found = torch.autograd.grad(loss, list(first.net.parameters()))
        grads.append(torch.cat([g.flatten() for g in found]))
    [row] = rows(tmp_path / "c")
    assert row["small_sq"] == pytest.approx(torch.stack(grads).square().sum(1).mean().item(), rel=1e-9)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss_and_a_batch_that_is_skipped_leave_no_row(tmp_path: Path) -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    options = {"max_epochs": 2, "max_steps": -1}
    trainer(str(tmp_path), callbacks=[GradientNoise(1, split=2)], **options).fit(Skips(), loader())
    found = rows(tmp_path)
    assert [r["gradients"] for r in found] == [2] * len(found)
    assert len(found) == 4  # batches 0 and 2 of both epochs


def test_under_a_grad_scaler(tmp_path: Path) -> None:
    """In half precision with a loss scale of 2^10, the figures are those without, up to rounding."""
    for name in ("float32", "float16"):
        pl.seed_everything(1, verbose=False)
        options: dict[str, Any] = {"max_steps": 3}
        if name == "float16":
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        trainer(str(tmp_path / name), callbacks=[GradientNoise(1, split=2)], **options).fit(Net(lr=1e-3), loader())
    for plain, other in zip(rows(tmp_path / "float32"), rows(tmp_path / "float16"), strict=True):
        for column in ("small_sq", "big_sq", "trace"):
            assert other[column] == pytest.approx(plain[column], rel=2e-2), column


def test_a_compiled_network_is_not_compiled_for_parts(tmp_path: Path) -> None:
    counter = CompileCounter()
    torch._dynamo.reset()
    for name in ("plain", "compiled"):
        pl.seed_everything(1, verbose=False)
        module = Net()
        if name == "compiled":
            module.net = torch.compile(module.net, backend=counter)
        trainer(str(tmp_path / name), callbacks=[GradientNoise(1, split=2)], max_steps=4).fit(module, loader())
    assert counter.frame_count == 1
    assert [r["trace"] for r in rows(tmp_path / "plain")] == [r["trace"] for r in rows(tmp_path / "compiled")]


def test_a_sparse_gradient(tmp_path: Path) -> None:
    class Embeds(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 3, sparse=True, dtype=torch.float64)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.table(batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Embeds()
    trainer(str(tmp_path), callbacks=[GradientNoise(1, split=2)], max_steps=1).fit(module, loader())
    [row] = rows(tmp_path)
    y = next(iter(loader()))[1]
    grads = [torch.autograd.grad(module.table(part).square().mean(), module.table.weight)[0] for part in y.chunk(2)]
    dense = torch.stack([g.to_dense() for g in grads])
    assert row["small_sq"] == pytest.approx(dense.square().sum((1, 2)).mean().item())
    assert row["big_sq"] == pytest.approx(dense.mean(0).square().sum().item())


@pytest.mark.parametrize("inside", [slice(0, 3), slice(2, 6)], ids=["first", "middle"])
def test_reentrant_checkpoints_are_refused_others_are_not(tmp_path: Path, inside: slice) -> None:
    """torch.autograd.grad would leave out the gradients of what is inside."""

    class Checkpointed(Net):
        reentrant = True

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = self.net[: inside.start](batch[0].requires_grad_())
            x = checkpoint(self.net[inside], x, use_reentrant=self.reentrant)
            return F.cross_entropy(self.net[inside.stop :](x), batch[1])

    module = Checkpointed()
    with pytest.raises(ValueError, match="does not see into checkpoints with use_reentrant=True; pass use_reentrant=F"):
        trainer(str(tmp_path), callbacks=[GradientNoise(1, split=2)]).fit(module, loader())
    figures = []
    for name, make in (("plain", Net), ("checkpointed", Checkpointed)):
        pl.seed_everything(1, verbose=False)
        module = make()
        module.reentrant = False
        trainer(str(tmp_path / name), callbacks=[GradientNoise(1, split=2)], max_steps=2).fit(module, loader())
        figures.append([r["trace"] for r in rows(tmp_path / name)])
    assert figures[0] == figures[1]


Named = namedtuple("Named", "x names")


@dataclasses.dataclass
class Labelled:
    """A batch as some libraries make them."""

    x: Tensor
    lengths: list[int]


class AttrDict(dict):
    """Whose items are its attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Wraps(MutableMapping):
    """Around a dict that copies share."""

    def __init__(self, inside: dict[str, Any]) -> None:
        self.inside = inside

    def __getitem__(self, key: str) -> Any:
        return self.inside[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.inside[key] = value

    def __delitem__(self, key: str) -> None:
        del self.inside[key]

    def __iter__(self) -> Any:
        return iter(self.inside)

    def __len__(self) -> int:
        return len(self.inside)


@given(n=st.integers(3, 30), parts=st.integers(2, 8))
def test_parts_are_the_batch_again(n: int, parts: int) -> None:
    x, names = torch.arange(3 * n).view(n, 3), [f"image {i}" for i in range(n)]
    inside = [x, Named(x[:, 0], tuple(names)), Labelled(x[:, 1], list(range(n)))]
    batch = {"x": inside, "names": names, "scale": 0.5, "size": (7, 9), "t": x.sum()}
    found = cut(batch, n, parts)
    if n < parts:
        assert found == []
        return
    sizes = [len(part["names"]) for part in found]
    assert len(found) == parts
    assert sum(sizes) == n
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.cat([part["x"][0] for part in found]), x)
    assert torch.equal(torch.cat([part["x"][1].x for part in found]), x[:, 0])
    assert [name for part in found for name in part["x"][1].names] == names
    assert torch.equal(torch.cat([part["x"][2].x for part in found]), x[:, 1])
    assert [i for part in found for i in part["x"][2].lengths] == list(range(n))
    assert all(part["scale"] == 0.5 and part["size"] == (7, 9) and part["t"] == x.sum() for part in found)
    assert len(batch["names"]) == n


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict, AttrDict, Wraps, lambda d: defaultdict(list, d)])
def test_mappings_stay_what_they_are(kind: Any) -> None:
    batch = kind({"x": torch.zeros(4, 2)})
    found = cut(batch, 4, 2)
    assert [type(part) for part in found] == [type(batch)] * 2
    assert [part["x"].shape for part in found] == [(2, 2)] * 2
    assert all(part.x.shape == (2, 2) for part in found if isinstance(part, AttrDict))
    assert batch["x"].shape == (4, 2)


def test_a_dataclass_tells_its_samples_by_its_first_tensor() -> None:
    assert batch_size(Labelled(torch.zeros(5, 2), [])) == 5


def test_arrays_are_divided_as_tensors_are() -> None:
    x = np.arange(8.0).reshape(4, 2)
    found = cut({"x": x, "scale": np.array(2.0)}, 4, 2)
    assert [part["x"].tolist() for part in found] == [x[:2].tolist(), x[2:].tolist()]
    with pytest.raises(ValueError, match=r"cannot split an array of shape \(4, 2\) in a batch of 5 samples"):
        cut({"x": x}, 5, 2)


class Graph:
    """Of nodes and edges, with as many samples as it says."""


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            [torch.zeros(4, 2), torch.zeros(2, 9)],
            r"cannot split a tensor of shape \(2, 9\) in a batch of 4 samples; pass split=f",
        ),
        (
            [torch.zeros(4), Graph()],
            "cannot split a Graph; pass split=f, a function of the batch that returns its parts",
        ),
    ],
)
def test_batches_that_cannot_be_split_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut(batch, 4, 2)


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`")
def test_a_step_that_cannot_be_evaluated_again_is_refused(tmp_path: Path) -> None:
    class Draws(SmallNet):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            return super().training_step(next(dataloader_iter)[0], 0)

    message = "GradientNoise, to split the batch, evaluates training_step, .* dataloader_iter; leave out split"
    with pytest.raises(ValueError, match=message):
        trainer(str(tmp_path), callbacks=[GradientNoise(1, split=2)]).fit(Draws(), loader())
