"""ChannelMoments against moments computed by hand from the activations, in float64."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm.layers
import torch
import torch.nn.functional as F
from callbacks_small import SmallNet, TwoOptimizers, loader, trainer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normzoo
from normzoo import convert_norms, create_norm, load_run
from normzoo.callbacks import ChannelMoments
from normzoo.callbacks._run.modules import find_modules
from normzoo.recognition import channel_dim, is_norm


class Activations(pl.Callback):
    """Keeps what each module is given and returns, for each step, and the running statistics before it."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.seen: dict[tuple[int, str, str], list[Tensor]] = {}
        self.running: dict[tuple[int, str], list[Tensor]] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for name in self.names:
            module = pl_module.get_submodule(name)

            def keep(module: Any, args: Any, output: Any, name: str = name) -> None:
                step = trainer.global_step
                for where, x in (("input", args[0]), ("output", output)):
                    self.seen.setdefault((step, name, where), []).append(x.detach().clone())

            def before(module: Any, args: Any, name: str = name) -> None:
                if hasattr(module, "running_var"):
                    values = [module.running_mean.clone().double(), module.running_var.clone().double()]
                    self.running.setdefault((trainer.global_step, name), values)

            module.register_forward_pre_hook(before)
            module.register_forward_hook(keep)


def rows(folder: Path) -> list[dict[str, Any]]:
    return load_run(folder / "log")["channel_moments"].to_dict("records")


def by_channel(parts: list[Tensor], dim: int) -> Tensor:
    """(C, values), float64."""
    return torch.cat([x.double().movedim(dim, 0).flatten(1) for x in parts], 1)


def check_row(row: dict[str, Any], parts: list[Tensor], dim: int = 1) -> None:
    values = by_channel(parts, dim)
    mean, variance = values.mean(1), values.var(1, correction=0)
    assert (row["channels"], row["count"]) == tuple(values.shape)
    assert row["mean"] == pytest.approx(mean.abs().mean().item(), rel=1e-5, abs=1e-7)
    assert row["variance"] == pytest.approx(variance.mean().item(), rel=1e-5)
    assert row["deviation"] == pytest.approx(variance.sqrt().mean().item(), rel=1e-5)
    assert row["variance_max"] == pytest.approx(variance.max().item(), rel=1e-5)
    assert row["dead"] == int((variance <= 1e-6 * variance.median()).sum())


def test_the_record_agrees_with_the_activations_of_all_micro_batches(tmp_path: Path) -> None:
    names = ["net.0", "net.1", "net.6"]
    activations = Activations(*names)
    callback = ChannelMoments(2, sites=["norms", "net.[06]"], where="both")
    run = trainer(str(tmp_path), callbacks=[activations, callback], max_steps=5, accumulate_grad_batches=3)
    run.fit(SmallNet(), loader())
    found = rows(tmp_path)
    assert [(r["step"], r["layer"], r["where"], r["depth"]) for r in found] == [
        (step, name, where, i) for step in (0, 2, 4) for i, name in enumerate(names) for where in ("input", "output")
    ]
    for row in found:
        step, name = row["step"], row["layer"]
        parts = activations.seen[step, name, row["where"]]
        assert len(parts) == 3
        check_row(row, parts)
        if (name, row["where"]) != ("net.1", "input"):
            assert math.isnan(row["mean_drift"])
            assert math.isnan(row["std_drift"])
            continue
        values = by_channel(parts, 1)
        running_mean, running_var = activations.running[step, name]
        s = running_var.sqrt()
        assert row["mean_drift"] == pytest.approx(((values.mean(1) - running_mean) / s).abs().mean().item(), rel=1e-5)
        assert row["std_drift"] == pytest.approx((values.std(1, correction=0) / s - 1).abs().mean().item(), rel=1e-5)


def test_scalars_reach_the_logger(tmp_path: Path) -> None:
    trainer(str(tmp_path), callbacks=[ChannelMoments(1, where="both")], max_steps=2).fit(SmallNet(), loader())
    header = (tmp_path / "log" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"channel_input/variance/net.1", "channel_output/dead/net.1", "channel_input/mean_drift/net.1"} <= set(
        header
    )
    assert "channel_output/mean_drift/net.1" not in header


def test_dead_channels_are_counted_against_the_median() -> None:
    packed = torch.tensor([[10.0] * 5, [1.0, -2.0, 0.0, 0.0, 3.0], [0.0, 1e-6, 10.0, 20.0, 40.0]], dtype=torch.float64)
    profile = ChannelMoments(dead_below=1e-6).profile(packed, torch.tensor([[0.0] * 5, [1.0] * 5]))
    assert profile["dead"] == 2
    assert (profile["mean"], profile["variance_max"], profile["count"]) == (1.2, 4.0, 10)
    assert profile["mean_drift"] == pytest.approx(1.2)
    packed[1:, 0] = math.nan
    assert math.isnan(ChannelMoments().profile(packed, None)["variance"])


class Tokens(pl.LightningModule):
    """Norms of torch and the zoo on (N, L, C), (N, C, L) and (N, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.rms = nn.LayerNorm(8), nn.RMSNorm(8)
        self.zoo = create_norm("layer", 8, channel_dim=-1)
        self.whole = nn.LayerNorm((1, 8, 8))
        self.linear = nn.Linear(8, 5)
        self.first = create_norm("group", 5, groups=5)
        self.flat = nn.BatchNorm1d(5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.whole(batch[0]).flatten(1, 2)
        x = self.linear(self.zoo(self.rms(self.last(x))))
        return F.cross_entropy(self.flat(self.first(x.mT).mean(2)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_channels_are_where_the_module_has_them(tmp_path: Path) -> None:
    dims = {"last": -1, "rms": -1, "zoo": -1, "whole": 1, "linear": -1, "first": 1, "flat": 1}
    activations = Activations(*dims)
    callback = ChannelMoments(1, sites=["norms", "linear"], where="both")
    trainer(str(tmp_path), callbacks=[activations, callback], max_steps=1).fit(Tokens(), loader())
    found = rows(tmp_path)
    assert {(r["layer"], r["where"]) for r in found} == {(n, w) for n in dims for w in ("input", "output")}
    for row in found:
        check_row(row, activations.seen[0, row["layer"], row["where"]], dims[row["layer"]])


class Scale(nn.Module):
    """A norm of a user's own, which no formula tells."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_what_convert_norms_made_from_a_factory_is_a_norm(copied: Any) -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Scale(4))
    linear = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    for model, dim in ((conv, 1), (linear, -1)):
        normzoo.convert_norms(model, Scale)
        found = find_modules(copied(nn.Sequential(model)), "norms")
        assert list(found) == ["0.1"]
        assert channel_dim(found["0.1"], 7) == dim
        decayed, spared = normzoo.param_groups(model, 0.1)
        assert [p.ndim for p in decayed["params"]] == [model[0].weight.ndim, *([1] * (dim == 1))]
        assert model[1].scale in set(spared["params"])


def test_norms_are_recognized() -> None:
    model = nn.ModuleDict(
        {
            "a": timm.layers.LayerNorm2d(4),
            "b": timm.layers.BatchNormAct2d(4),
            "c": timm.layers.ConvNormAct(3, 4),
            "d": timm.layers.FilterResponseNormTlu2d(4),
            "e": create_norm("none", 4),
            "f": create_norm("switchable", 4),
            "g": nn.Sequential(nn.SyncBatchNorm(4), nn.ReLU(), nn.Linear(4, 4)),
        }
    )
    assert list(find_modules(model, "norms")) == ["a", "b", "c.bn", "d", "e", "f", "g.0"]
    assert is_norm(model["a"])
    assert [channel_dim(model[k], 1) for k in "abdef"] == [1] * 5
    assert channel_dim(timm.layers.RmsNorm(4), 1) == channel_dim(timm.layers.LayerNorm(4), 1) == -1


class Checkpointed(SmallNet):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.runs = 0
        self.net[1].register_forward_hook(self.count)

    def count(self, *args: Any) -> None:
        self.runs += 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.reentrant is None:
            x = self.net[:3](x)
        else:
            x = checkpoint(self.net[:3], x.requires_grad_(), use_reentrant=self.reentrant)
        return F.cross_entropy(self.net[4:](x), y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_computes_again_is_not_counted(tmp_path: Path, reentrant: bool) -> None:
    found = {}
    for name, how in (("plain", None), ("checkpointed", reentrant)):
        pl.seed_everything(1, verbose=False)
        module = Checkpointed(how)
        options = {"max_steps": 1, "accumulate_grad_batches": 2}
        trainer(str(tmp_path / name), callbacks=[ChannelMoments(1, where="both")], **options).fit(module, loader())
        assert module.runs == (2 if how is None else 4)
        found[name] = rows(tmp_path / name)
    for a, b in zip(*found.values(), strict=True):
        for column in ("layer", "where", "count", "mean", "variance", "variance_max"):
            assert a[column] == b[column], column
        assert a["count"] == 16 * 64


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_hooks_are_there_for_sampled_steps_only(tmp_path: Path) -> None:
    counted = []

    class Counts(SmallNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            counted.append(hooks(self))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert hooks(self) == 0
            self.net(batch[0])

    module = Counts()
    options = {"max_steps": 6, "accumulate_grad_batches": 2, "val_check_interval": 1, "limit_val_batches": 1}
    trainer(str(tmp_path), callbacks=[ChannelMoments(3, where="both")], **options).fit(module, loader(), loader())
    assert counted == [2, 2, 0, 0, 0, 0] * 2
    assert hooks(module) == 0


def test_hooks_are_removed_when_the_forward_pass_raises(tmp_path: Path) -> None:
    class Fails(SmallNet):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.net(batch[0])
            assert hooks(self) == 2
            raise RuntimeError("from the user's step")

    module = Fails()
    with pytest.raises(RuntimeError, match="from the user's step"):
        trainer(str(tmp_path), callbacks=[ChannelMoments(1, where="both")]).fit(module, loader())
    assert hooks(module) == 0


def test_several_optimizers_under_manual_optimization(tmp_path: Path) -> None:
    activations = Activations("net.1")
    trainer(str(tmp_path), callbacks=[activations, ChannelMoments(4)], max_steps=12).fit(TwoOptimizers(), loader())
    found = rows(tmp_path)
    assert [r["step"] for r in found] == [0, 4, 8]
    for row in found:
        check_row(row, activations.seen[row["step"], "net.1", "input"])  # the second call is at the next step


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "at.ckpt")

    def run(steps: int, **options: Any) -> None:
        callbacks = [ChannelMoments(2, dirpath=str(tmp_path / "log")), Saves()]
        trainer(str(tmp_path), callbacks=callbacks, max_steps=steps, logger=False).fit(SmallNet(), loader(), **options)

    run(3)
    with pytest.warns(UserWarning, match="not resumable"):
        run(7, ckpt_path=tmp_path / "at.ckpt", weights_only=False)
    assert [r["step"] for r in rows(tmp_path)] == [0, 2, 4, 6]


def test_a_module_that_is_not_called_is_named(tmp_path: Path) -> None:
    class Spare(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.BatchNorm2d(3)

    with pytest.warns(UserWarning, match="ChannelMoments does not follow the input of spare: no call of it"):
        trainer(str(tmp_path), callbacks=[ChannelMoments(1)], max_steps=3).fit(Spare(), loader())
    assert {(r["layer"], r["depth"]) for r in rows(tmp_path)} == {("net.1", 0)}


def test_a_network_made_in_configure_model(tmp_path: Path) -> None:
    class Late(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net: Any = None
            self.head = nn.Linear(2, 2)  # there at setup, when the rest is not

        def configure_model(self) -> None:
            self.net = self.net or SmallNet().net

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer(str(tmp_path), callbacks=[ChannelMoments(1)], max_steps=1).fit(Late(), loader())
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
        ({"where": "inputs"}, "where must be one of 'input', 'output', 'both', not 'inputs'"),
        ({"sites": []}, "sites must be 'norms' or at least one name"),
        ({"dead_below": 1.0}, "dead_below must be from 0 to below 1, not 1.0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelMoments(**options)


def test_sites_that_match_nothing_are_refused_at_setup(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no module matches 'conv\*'; there are net, net.0"):
        trainer(str(tmp_path), callbacks=[ChannelMoments(sites="conv*")]).fit(SmallNet(), loader())
    module = SmallNet()
    module.net[1] = nn.Identity()
    with pytest.raises(ValueError, match=r"no module is a normalization layer; there are net, net.0"):
        trainer(str(tmp_path), callbacks=[ChannelMoments()]).fit(module, loader())


class RootMeanSquare(nn.Module):
    """A class that no table knows, with its channels last."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.gain


class OwnNorms(SmallNet):
    def __init__(self) -> None:
        super().__init__()
        self.mine = RootMeanSquare(6)
        self.gate = nn.PReLU(6)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens = batch[0].flatten(1)[:, :24].reshape(-1, 4, 6)
        return super().training_step(batch, batch_idx) + self.mine(tokens).square().mean()


def test_norms_of_unknown_classes_are_recognised_on_request(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"recognise must be True, False or the report of a conversion, not 3"):
        ChannelMoments(recognise=3)
    report = convert_norms(nn.ModuleDict({"mine": RootMeanSquare(6)}), "rms")
    assert list(report.recognised) == ["mine"]
    for i, (recognise, there) in enumerate(((False, False), (True, True), (report, True))):
        kept = Activations("mine")
        folder = tmp_path / str(i)
        callbacks = [ChannelMoments(1, recognise=recognise), kept]
        trainer(folder, callbacks=callbacks, max_steps=1).fit(OwnNorms(), loader())
        found = [r for r in rows(folder) if r["layer"] == "mine"]
        assert bool(found) == there
        if there:
            check_row(found[0], kept.seen[0, "mine", "input"], -1)


def test_what_has_no_channels_is_refused(tmp_path: Path) -> None:
    class Odd(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.loss, self.table, self.recurrent = nn.CrossEntropyLoss(), nn.Embedding(4, 3), nn.LSTM(8, 8)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.table(batch[1])
            self.recurrent(batch[0][:, 0])
            return self.loss(self.net(batch[0]), batch[1])

    for site, where, what in (
        ("loss", "output", r"a torch.float32 of shape \(\)"),
        ("table", "input", r"a torch.int64 of shape \(8,\)"),
        ("recurrent", "output", "a tuple"),
    ):
        with pytest.raises(ValueError, match=f"along dimension 1; the {where} of {site} is {what}; choose other sites"):
            trainer(str(tmp_path / site), callbacks=[ChannelMoments(sites=site, where=where)]).fit(Odd(), loader())


def test_channels_that_change_are_refused(tmp_path: Path) -> None:
    class Shrinks(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.pick = nn.Identity()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.pick(batch[0][:, 0, : 8 - batch_idx])
            return super().training_step(batch, batch_idx)

    message = (
        "the input of pick had 8 channels along dimension 1, and now 7; if they are along another, pass channel_dim"
    )
    with pytest.raises(ValueError, match=message):
        trainer(str(tmp_path), callbacks=[ChannelMoments(1, sites="pick")]).fit(Shrinks(), loader())


@pytest.mark.parametrize("sites", [3, None, [1], {"norms": 1}])
def test_sites_are_names(sites: Any) -> None:
    with pytest.raises(TypeError, match="sites must be 'norms', or names or patterns of modules, not"):
        ChannelMoments(sites=sites)
