"""Sums of the terms of convolutions' gradients in a run, against all terms in float64, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from callbacks_small import SmallNet, TwoOptimizers, loader, trainer
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from normzoo import load_run, watch
from normzoo.callbacks import GradientSums


class Net(nn.Module):
    """Convolutions of many kinds; one is called twice, and activations overwrite what convolutions return."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.shared = nn.Conv2d(4, 4, 3, padding="same", bias=False)
        self.grouped = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2)
        self.reflecting = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect")
        self.point = weight_norm(nn.Conv2d(6, 3, 1, stride=2))
        self.frozen = nn.Conv2d(3, 3, 1).requires_grad_(False)
        self.line = nn.Conv1d(3, 2, 2, padding=1)
        self.head = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.act(self.shared(self.act(self.shared(x))))
        x = self.reflecting(self.act(self.grouped(x)))
        x = self.frozen(self.act(self.point(x)))
        return self.head(self.line(x.flatten(2)).mean(2))


class Module(SmallNet):
    """Trains a network of many convolutions, and keeps it as it is before each step, with the batch."""

    def __init__(self, net: Callable[[], nn.Module] = Net) -> None:
        super().__init__()
        torch.manual_seed(0)  # in other random networks a layer may be dead, with sums of 0
        self.net = net()  # type: ignore[assignment]
        self.kept: list[tuple[nn.Module, Any]] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.kept.append((copy.deepcopy(self.net).double(), batch))


def by_terms(net: nn.Module, batch: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """For each convolution the sum of all terms and that of their magnitudes, from all terms, in float64."""
    calls: list[tuple[str, Any, Tensor, Tensor]] = []
    for name, m in net.named_modules():
        if isinstance(m, nn.Conv1d | nn.Conv2d):
            m.register_forward_hook(
                lambda m, args, out, name=name: calls.append((name, m, args[0].detach().clone(), out)) or out.clone()
            )
    loss = F.cross_entropy(net(batch[0].double()), batch[1])
    gradients = torch.autograd.grad(loss, [output for *_, output in calls])
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for (name, m, x, _), g in zip(calls, gradients, strict=True):
        padding = m._reversed_padding_repeated_twice
        x = F.pad(x, padding, mode="constant" if m.padding_mode == "zeros" else m.padding_mode)
        kernel, stride, dilation = m.kernel_size, m.stride, m.dilation
        if x.ndim == 3:  # one dimension is two of which one has length 1
            x, g = x[:, :, None], g[:, :, None]
            kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
        patches = F.unfold(x, kernel, dilation, stride=stride)  # (B, I * entries, L)
        patches = patches.view(len(x), m.groups, -1, patches.shape[2])
        g = g.flatten(2).view(len(x), m.groups, -1, patches.shape[3])
        terms = (g[:, :, :, None] * patches[:, :, None]).movedim(0, -1).flatten(-2)  # (groups, O/g, I/g * entries, B*L)
        shape = (m.out_channels, m.in_channels // m.groups, *m.kernel_size)
        pair = (terms.sum(-1).view(shape), terms.abs().sum(-1).view(shape))
        if name in found:
            pair = (pair[0] + found[name][0], pair[1] + found[name][1])
        found[name] = pair
    return found


def recorded(folder: Path, module: pl.LightningModule, *given: GradientSums, **options: Any) -> pd.DataFrame:
    options = {"max_steps": 1} | options
    data = options.pop("data", None) or loader()
    trainer(str(folder), callbacks=[*given], **options).fit(module, data)
    return load_run(folder / "log")["gradient_sums"]


def test_sums_are_those_of_all_terms(tmp_path: Path) -> None:
    module = Module()
    record = recorded(
        tmp_path,
        module,
        GradientSums(2, channels="*"),
        max_steps=3,
        accumulate_grad_batches=2,
        gradient_clip_val=1e-3,
    )
    names = [f"net.{n}" for n in ("stem", "shared", "grouped", "reflecting", "point", "line")]
    assert record["step"].unique().tolist() == [0, 2]
    for step in (0, 2):
        net, batch = module.kept[2 * step + 1]  # the last micro-batch of the step
        terms = by_terms(net, batch)
        rows = record[record["step"] == step]
        kernels = rows[rows["of"] == "kernel"].set_index("layer")
        assert kernels.index.tolist() == names
        assert kernels["depth"].tolist() == [1, 2, 3, 4, 5, 6]
        assert kernels[["channel", "channel_ratio"]].isna().all(axis=None)
        for name in names:
            sums, magnitudes = (values.abs() for values in terms[name.removeprefix("net.")])
            row = kernels.loc[name]
            assert row["sum"] == pytest.approx(sums.mean().item(), rel=1e-4)
            assert row["magnitudes"] == pytest.approx(magnitudes.mean().item(), rel=1e-4)
            assert row["ratio"] == row["sum"] / row["magnitudes"]
            assert 0 < row["ratio"] < 1
            conv = net.get_submodule(name.removeprefix("net."))
            groups = conv.groups
            for of, count in (("output", conv.out_channels), ("input", conv.in_channels)):
                channels = rows[(rows["layer"] == name) & (rows["of"] == of)]
                assert channels["channel"].tolist() == [*range(count)]
                assert channels["ratio"].isna().all()
                for c, total, size in zip(range(count), channels["sum"], channels["magnitudes"], strict=True):
                    mine = (
                        [s[c] for s in (sums, magnitudes)]
                        if of == "output"
                        else [s.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)[c] for s in (sums, magnitudes)]
                    )
                    assert [total, size] == pytest.approx([m.mean().item() for m in mine], rel=1e-4, abs=1e-12)


def test_a_gradient_of_one_sign_has_a_ratio_of_one(tmp_path: Path) -> None:
    class Positive(SmallNet):
        """Has inputs, and gradients of outputs, of one sign each."""

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return self.net[0](batch[0].abs()).mean()

    record = recorded(tmp_path, Positive(), GradientSums(1))
    assert record["ratio"].tolist() == pytest.approx([1.0])


def test_sites_and_channels_are_chosen_by_name(tmp_path: Path) -> None:
    record = recorded(tmp_path, Module(), GradientSums(1, sites=["*.s*", "net.point"], channels="*.stem"))
    kernels = record[record["of"] == "kernel"]
    assert kernels["layer"].tolist() == ["net.stem", "net.shared", "net.point"]
    assert record[record["of"] != "kernel"]["layer"].unique().tolist() == ["net.stem"]


def test_a_convolution_that_is_not_called_has_zeros(tmp_path: Path) -> None:
    class Unused(SmallNet):
        """Has a convolution that nobody calls."""

        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Conv2d(2, 2, 3)

    record = recorded(tmp_path, Unused(), GradientSums(1)).set_index("layer")
    assert record.loc["unused", ["sum", "magnitudes"]].tolist() == [0, 0]
    assert pd.isna(record.loc["unused", "ratio"])
    assert record.loc["net.0", "ratio"] > 0


def test_a_compiled_network_is_listened_to(tmp_path: Path) -> None:
    frames = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = Module()
        if compiled:
            module.net.compile(backend="eager")
            module.kept = None  # type: ignore[assignment]
            module.on_train_batch_start = lambda *_: None  # type: ignore[method-assign]
        frames.append(recorded(tmp_path / str(compiled), module, GradientSums(1)))
    pd.testing.assert_frame_equal(*frames)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_followed_or_refused(tmp_path: Path, reentrant: bool) -> None:
    class Checkpointed(Module):
        """Computes the network again in the backward pass."""

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            x = batch[0].clone().requires_grad_()
            return F.cross_entropy(checkpoint(self.net, x, use_reentrant=reentrant), batch[1])

    torch.manual_seed(0)
    module = Checkpointed()
    if reentrant:
        with pytest.raises(ValueError, match="GradientSums takes gradients by .* use_reentrant=False"):
            recorded(tmp_path, module, GradientSums(1))
        return
    found = recorded(tmp_path / "again", module, GradientSums(1))
    torch.manual_seed(0)
    pd.testing.assert_frame_equal(found, recorded(tmp_path / "plain", Module(), GradientSums(1)))


def test_a_parametrization_is_not_asked_outside_of_the_pass(tmp_path: Path) -> None:
    weights = []
    for given in ([], [GradientSums(1)]):
        torch.manual_seed(0)
        module = SmallNet()
        module.net[0] = spectral_norm(module.net[0])  # which moves its vectors whenever it is asked for the weight
        torch.manual_seed(0)
        trainer(str(tmp_path / str(len(given))), callbacks=given, max_steps=3).fit(module, loader())
        weights.append(module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_a_plain_loop_gives_its_loss(tmp_path: Path) -> None:
    model = Net()
    twin = copy.deepcopy(model).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = torch.randn(6, 1, 8, 8), torch.randint(0, 4, (6,))
    measurement = GradientSums(1, loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    with watch(model, optimizer, measurement, dirpath=tmp_path) as watching:
        watching.batch(batch)
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    record = load_run(tmp_path)["gradient_sums"].set_index("layer")
    for name, (sums, _) in by_terms(twin, batch).items():
        if name != "frozen":
            assert record.loc[name, "sum"] == pytest.approx(sums.abs().mean().item(), rel=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sites": []}, ValueError, "sites must be at least one name or pattern of convolutions; it is empty"),
        ({"sites": [3]}, TypeError, r"sites must be a name or pattern of convolutions, or a list of these, not \[3\]"),
        ({"channels": 3}, TypeError, "channels must be a name or pattern of convolutions"),
        ({"loss": 3}, TypeError, r"loss must be a function of \(module, batch\), or None, not 3"),
    ],
)
def test_arguments_of_another_kind_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GradientSums(1, **options)


class Same(SmallNet):
    """Has a convolution that pads by its own rule."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0] = Conv2dSame(1, 8, 3, stride=1)


class Dense(SmallNet):
    """Has no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Dense, {}, r"no trained convolution matches sites=\['\*'\]; there are none: leave GradientSums out"),
        (SmallNet, {"sites": "conv*"}, r"no trained convolution matches sites=\['conv\*'\]; there are net\.0$"),
        (SmallNet, {"channels": "conv*"}, r"no trained convolution matches channels=\['conv\*'\]; there are net\.0$"),
        (Same, {}, r"takes outputs of net\.0 to be of size \[6, 6\], .* they are of size \[8, 8\]; choose other sites"),
        (TwoOptimizers, {}, "pass loss=, a function of"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, module: type[pl.LightningModule], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recorded(tmp_path, module(), GradientSums(1, **options))


def test_a_scripted_convolution_is_refused(tmp_path: Path) -> None:
    module = SmallNet()
    module.scripted = torch.jit.script(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(ValueError, match="matches|torch.jit has made it"):
        recorded(tmp_path, module, GradientSums(1, sites="scripted*"))


def test_half_precision_has_the_scale_taken_away(tmp_path: Path) -> None:
    x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 4, (8,))
    records = []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        data = DataLoader(TensorDataset(x, y), 8)
        module = Module()
        records.append(recorded(tmp_path / precision, module, GradientSums(1), precision=precision, data=data))
    exact, rounded = (record["magnitudes"] for record in records)
    assert rounded.tolist() == pytest.approx(exact.tolist(), rel=0.05)
