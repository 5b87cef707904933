"""The classification task trained for a few steps."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks

from normzoo.data._loader import BatchLoader
from normzoo.task import ImageClassification


def batches(count: int = 24, *, shuffle: bool = True) -> BatchLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 16, 16), generator=generator, dtype=torch.uint8)
    return BatchLoader(images, torch.arange(count) % 3, 8, mean=(0.5,), std=(0.3,), shuffle=shuffle)


def task(**options: Any) -> ImageClassification:
    torch.manual_seed(0)
    return ImageClassification("resnet20_cifar", **{"norm": "batch", "num_classes": 3, "in_chans": 1, **options})


def trainer(**options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(accelerator="cpu", **{"max_epochs": 1, "num_sanity_val_steps": 0, **quiet, **options})


def test_test_metrics_are_those_of_the_whole_set() -> None:
    module, run = task(label_smoothing=0.5), trainer(max_epochs=2)  # of the training loss alone
    run.fit(module, batches(), batches(20, shuffle=False))
    module.eval()
    with torch.no_grad():
        pairs = [(module(x), y) for x, y in batches(20, shuffle=False)]
    logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    assert run.callback_metrics["test/accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert run.callback_metrics["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_channels_last_changes_the_layout_and_not_the_result() -> None:
    module = task(channels_last=True)
    assert module.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    seen = []
    module.model.bn1.register_forward_hook(
        lambda m, args, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    x = torch.randn(4, 1, 16, 16)
    assert torch.allclose(module.eval()(x), task().eval()(x), atol=1e-5)
    assert seen == [True]


def test_the_schedule_moves_once_an_epoch() -> None:
    rates: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = task(
        optimizer=functools.partial(torch.optim.SGD, lr=0.5),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[1], gamma=0.1),
    )
    trainer(max_epochs=2, callbacks=[Watch()]).fit(module, batches(), batches(shuffle=False))
    assert rates == pytest.approx([0.5] * 3 + [0.05] * 3)


def test_the_optimizer_by_default() -> None:
    optimizer = task().configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_options_reach_timm_and_smoothing_the_loss() -> None:
    module = task(model_options={"drop_rate": 0.25}, label_smoothing=0.5)
    assert module.model.drop_rate == 0.25
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    x, y = next(iter(batches()))
    module.model.drop_rate = 0.0
    module.train()
    expected = F.cross_entropy(module.model(x), y, label_smoothing=0.5)
    assert module.training_step((x, y), 0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_smoothing_is_a_share() -> None:
    with pytest.raises(ValueError, match="label_smoothing must be from 0 to 1, not 1.5"):
        task(label_smoothing=1.5)


@pytest.mark.slow
def test_a_compiled_network_trains_alike() -> None:
    """Steps are short: at long ones a single unit that rounding turns off leads elsewhere."""

    def change(compile: bool) -> torch.Tensor:
        optimizer = functools.partial(torch.optim.SGD, lr=1e-3)
        module = task(norm="batch_renorm", compile=compile, optimizer=optimizer)
        before = torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()
        trainer().fit(module, batches(), batches(shuffle=False))
        return torch.nn.utils.parameters_to_vector(module.parameters()).detach() - before

    plain = change(False)
    assert (change(True) - plain).norm() < 0.02 * plain.norm()


VALIDATE = """
import json, os, sys
sys.path.insert(0, os.environ["TESTS"])
import lightning.pytorch as pl, torch
from test_task import batches, task, trainer
run = trainer(devices=2, strategy="ddp", use_distributed_sampler=False)
rank = int(os.environ["RANK"])
whole = list(batches(20, shuffle=False))
loader = torch.utils.data.DataLoader(whole[:1] if rank == 0 else whole[1:], batch_size=None)
run.validate(task(), loader, verbose=False)
with open(f"rank{rank}.json", "w") as file:
    json.dump({k: v.item() for k, v in run.callback_metrics.items()}, file)
"""


def test_test_metrics_are_of_all_ranks(tmp_path: Path) -> None:
    """The first rank has 8 images, the second 12."""
    run_ranks(tmp_path, VALIDATE, 2)
    module = task().eval()
    with torch.no_grad():
        pairs = [(module(x), y) for x, y in batches(20, shuffle=False)]
    logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert found["test/accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
