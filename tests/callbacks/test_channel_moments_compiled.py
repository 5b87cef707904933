"""ChannelMoments of modules that torch.compile has made: a pass of its own, which the run does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from callbacks_small import SmallNet, TwoOptimizers, loader, trainer
from sweeps import slow
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from normzoo import load_run
from normzoo.callbacks import ChannelMoments, GradientNoise, RelativeLoss


def rows(folder: Path) -> list[dict[str, Any]]:
    return load_run(folder / "log")["channel_moments"].to_dict("records")


def compiled_whole() -> Any:
    class Whole(SmallNet):
        log = torch.compiler.disable(SmallNet.log)  # torch 2.12 cannot trace that of Lightning

    return torch.compile(Whole(), backend="eager")


def compiled_part() -> Any:
    module = SmallNet()
    module.net = torch.compile(module.net, backend="eager")
    return module


def compiled_in_place() -> Any:
    module = SmallNet()
    module.net.compile(backend="eager")
    return module


def compiled_forward() -> Any:
    module = SmallNet()
    module.net.forward = torch.compile(module.net.forward, backend="eager")
    return module


def compiled_helper() -> Any:
    class Calls(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.logits = torch.compile(self._logits, backend="eager")

        def _logits(self, x: Tensor) -> Tensor:
            return self.net(x)

    return Calls()


def compiled_in_a_list() -> Any:
    class Calls(SmallNet):
        """In a list, so that the state dict has it once."""

        def __init__(self) -> None:
            super().__init__()
            self.compiled = [{"net": torch.compile(self.net, backend="eager")}]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            net, self.net = self.net, self.compiled[0]["net"]
            try:
                return super().training_step(batch, batch_idx)
            finally:
                self.net = net

    return Calls()


def compiled_method() -> Any:
    class Compiled(SmallNet):
        @torch.compile(backend="eager")
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    return Compiled()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at all of a tensor's
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin.*list.append")  # that of SmallNet
@pytest.mark.parametrize(
    "made",
    [
        slow(compiled_whole),
        compiled_part,
        compiled_in_place,
        compiled_forward,
        compiled_helper,
        compiled_in_a_list,
        compiled_method,
    ],
    ids=lambda f: f.__name__,
)
def test_compiled_modules_are_measured_as_uncompiled_ones(tmp_path: Path, made: Any) -> None:
    """Both runs are of the same bits under the backend "eager", and so are the inputs of the layers."""
    torch._dynamo.reset()
    frames, weights, modules = [], [], []
    for name, make in (("plain", SmallNet), ("compiled", made)):
        pl.seed_everything(3, verbose=False)
        module = make()
        callbacks = [ChannelMoments(2, sites=["norms", "net.6"], where="both")]
        trainer(str(tmp_path / name), callbacks=callbacks, max_steps=5, accumulate_grad_batches=2).fit(module, loader())
        frames.append(load_run(tmp_path / name / "log")["channel_moments"])
        modules.append(getattr(module, "_orig_mod", module))
        weights.append([p.detach() for p in module.parameters()])
    assert len(frames[0]) == 3 * 2 * 2
    pd.testing.assert_frame_equal(*frames)
    assert all(map(torch.equal, *weights))
    assert modules[0].calls == modules[1].calls
    assert modules[0].seen == modules[1].seen


def test_a_sampled_step_compiles_nothing(tmp_path: Path) -> None:
    """Neither the pass of our own nor, because of what it changed and put back, the run's next ones."""

    def graphs(name: str, callbacks: list[pl.Callback]) -> int:
        torch._dynamo.reset()
        counter = CompileCounter()
        module = SmallNet()
        module.net = torch.compile(module.net, backend=counter)
        trainer(str(tmp_path / name), callbacks=callbacks, max_steps=6).fit(module, loader())
        return counter.frame_count

    assert graphs("a", []) == graphs("b", [ChannelMoments(2)]) == 1


@pytest.mark.parametrize("made", [SmallNet, compiled_part])
def test_passes_of_other_callbacks_are_not_heard(tmp_path: Path, made: Any) -> None:
    """Those of RelativeLoss, and of GradientNoise on parts, which comes while ChannelMoments listens."""
    frames = []
    for name, others in (("alone", []), ("beside", [GradientNoise(1, split=2), RelativeLoss(1)])):
        pl.seed_everything(3, verbose=False)
        callbacks = [ChannelMoments(1, where="both"), *others]
        trainer(str(tmp_path / name), callbacks=callbacks, max_steps=3).fit(made(), loader())
        frames.append(load_run(tmp_path / name / "log")["channel_moments"])
    pd.testing.assert_frame_equal(*frames)


class SkipsTheRest(SmallNet):
    """Skips what is left of an epoch after its first batch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 1 else None


@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_that_is_skipped_is_not_counted(tmp_path: Path, compiled: bool) -> None:
    module = SkipsTheRest()
    if compiled:
        module.net = torch.compile(module.net, backend="eager")
    run = trainer(str(tmp_path), callbacks=[ChannelMoments(1)], max_epochs=3, max_steps=-1)
    run.fit(module, loader())
    assert [r["count"] for r in rows(tmp_path)] == [8 * 64] * 3


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`")
def test_a_compiled_step_that_cannot_be_evaluated_again_is_refused(tmp_path: Path) -> None:
    class Draws(SmallNet):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            return super().training_step(next(dataloader_iter)[0], 0)

    for make, why in ((TwoOptimizers, "under manual optimization takes optimizer steps"), (Draws, "dataloader_iter")):
        module = make()
        module.net = torch.compile(module.net, backend="eager")
        message = f"ChannelMoments, for modules that are compiled, evaluates .*{why}.* choose sites outside"
        with pytest.raises(ValueError, match=message):
            trainer(str(tmp_path), callbacks=[ChannelMoments(1)]).fit(module, loader())


def test_scripted_modules_are_refused(tmp_path: Path) -> None:
    module = SmallNet()
    module.net = torch.jit.script(module.net)
    with pytest.raises(ValueError, match=r"ChannelMoments cannot listen to net\.1: torch\.jit has made it"):
        trainer(str(tmp_path), callbacks=[ChannelMoments(1, sites="net.1")]).fit(module, loader())


def test_a_module_outside_of_what_is_compiled_is_followed(tmp_path: Path) -> None:
    module = SmallNet()
    module.net[0] = torch.compile(module.net[0], backend="eager")
    trainer(str(tmp_path), callbacks=[ChannelMoments(1)], max_steps=2).fit(module, loader())
    assert [r["layer"] for r in rows(tmp_path)] == ["net.1"] * 2
