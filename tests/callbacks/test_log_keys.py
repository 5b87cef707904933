"""The page of log keys holds what is logged, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from callbacks_small import SmallNet, loader, trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from normzoo.callbacks import ChannelMoments, Divergence, GradientNoise, GradientTails, RelativeLoss

PAGE = Path(__file__).parents[2] / "docs" / "log-keys.md"


def documented() -> set[str]:
    """Keys with LAYER and MULTIPLE as they stand, and those that a row only means written out."""
    keys = {k for row in re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.M) for k in re.findall(r"`(\S+)`", row)}
    short = {k for k in keys if k.endswith("/...")}
    for name in short:
        like = "gradient/" if name in ("update/...", "noise/...") else "channel_input/"
        keys |= {k.replace(like, name[:-3]) for k in keys if k.startswith(like)}
    return keys - short - {"channel_output/mean_drift/LAYER"}


def test_the_page_holds_what_is_logged(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="log")
    callbacks = [
        GradientTails(1, of=["gradient", "update", "noise"]),
        RelativeLoss(1),
        Divergence(threshold=1e-9),
        ChannelMoments(1, where="both"),
        GradientNoise(1),
    ]
    trainer(str(tmp_path), callbacks=callbacks, max_steps=3, accumulate_grad_batches=2, logger=logger).fit(
        SmallNet(), loader()
    )
    events = EventAccumulator(str(tmp_path / "log"), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()
    own = {"loss_step", "loss_epoch", "loss", "accuracy", "epoch", "hp_metric"}
    logged = {t for kind in ("scalars", "histograms", "images") for t in tags[kind]} - own
    patterns = {
        k: re.compile(re.escape(k).replace("LAYER", r"net\.\d[\w.]*").replace("MULTIPLE", r"[-\d.e]+"))
        for k in documented()
    }
    unknown = {t for t in logged if not any(p.fullmatch(t) for p in patterns.values())}
    silent = {k for k, p in patterns.items() if not any(p.fullmatch(t) for t in logged)}
    assert not unknown, "logged, but not on the page"
    assert not silent, "on the page, but not logged"
    assert len(patterns) == 35
