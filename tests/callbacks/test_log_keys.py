"""The page of log keys is made from the measurements, and holds what is logged and nothing else.

``python tests/callbacks/test_log_keys.py`` writes its tables anew.
"""

from __future__ import annotations

import io
import re
import string
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from callbacks_small import SmallNet, loader, trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from ranks import run_function
from schemas import MEASUREMENTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from normzoo.callbacks import (
    ChannelMoments,
    ClassGradients,
    Column,
    Divergence,
    Figure,
    GradientNoise,
    GradientNorm,
    GradientPredictiveness,
    GradientSums,
    GradientTails,
    LossAbove,
    Measurement,
    ParameterNorms,
    RelativeLoss,
    Sharpness,
)
from normzoo.callbacks.measurement import warn_of_earlier_keys
from normzoo.records.reading import load_run
from normzoo.report.drawing import draw_figure
from normzoo.report.export import pixels

PAGE = Path(__file__).parents[2] / "docs" / "log-keys.md"
TABLE = ["| key | by | what | also |", "|---|---|---|---|"]
PARTS = ["| part | by | what |", "|---|---|---|"]
CURVE = "relative_loss/at/MULTIPLE"  # made of two columns, which no column says


def in_capitals(template: str, statistic: str) -> str:
    """A template of a log key, with the statistic, and with columns in capitals."""
    return re.sub(r"{(\w+)}", lambda m: statistic if m[1] == "stat" else m[1].upper(), template)


def key_rows(measurement: type[Measurement]) -> Iterator[str]:
    """A row for each column that is logged, for each histogram, and for each figure of single samples."""
    name, by = measurement.name, f"`{measurement.__name__}`"
    histograms = [c for c in measurement.schema.columns if c.kind == "histogram"]
    for column in [c for c in measurement.schema.columns if c.logged] + histograms:
        statistic = column.statistic or column.name
        earlier = in_capitals(measurement.earlier_key, statistic)
        also = "TensorBoard only" if column in histograms else f"`{earlier}`" if earlier else ""
        yield f"| `{name}/{in_capitals(measurement.key_in_use, statistic)}` | {by} | {column.meaning} | {also} |"
    for figure in (f for f in measurement.figures if f.samples):
        yield f"| `{name}/{tag(figure)}` | {by} | {figure.title} | TensorBoard only, a figure |"


def tag(figure: Figure) -> str:
    return figure.title.lower().replace(" ", "_")


def part_rows(measurement: type[Measurement]) -> Iterator[str]:
    """A row for each part of the keys that is the value of a column."""
    columns: dict[str, Column] = {c.name: c for c in measurement.schema.columns}
    for _, part, _, _ in string.Formatter().parse(measurement.key_in_use):
        if part and part != "stat":
            yield f"| {part.upper()} | `{measurement.__name__}` | {columns[part].meaning} |"


def tables() -> list[str]:
    return [
        "\n".join([*head, *(row for m in MEASUREMENTS.values() for row in rows(m))])
        for head, rows in ((TABLE, key_rows), (PARTS, part_rows))
    ]


def documented() -> set[str]:
    """The keys in the first table, and the earlier ones."""
    rows = re.findall(r"^\| (`.*?`) \| `\w+` \| .* \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    return {key for row in rows for cell in row for key in re.findall(r"`(\S+)`", cell)} | {CURVE}


def test_the_page_holds_the_tables() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for table in tables():
        assert f"\n\n{table}\n\n" in text, "run python tests/callbacks/test_log_keys.py"
    assert f"`{CURVE}`" in text


def test_the_page_holds_what_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rendering the images takes longer than all else, and their keys are what is compared.
    monkeypatch.setattr("normzoo.report.export.pixels", lambda chart: np.zeros((1, 1, 3), np.uint8))
    logger = TensorBoardLogger(str(tmp_path), name="", version="log")
    callbacks = [
        GradientTails(1, of=["gradient", "update", "noise"]),
        RelativeLoss(3),
        Divergence(rules=[LossAbove(1e-9)]),
        ChannelMoments(1, where="both"),
        GradientNoise(1),
        GradientNorm(1, layers=1, window=1),
        ParameterNorms(2),
        GradientPredictiveness(1),
        Sharpness(1, products=2),
        ClassGradients(1),
        GradientSums(1),
    ]
    assert {type(c) for c in callbacks} == {*MEASUREMENTS.values()}
    trainer(str(tmp_path), callbacks=callbacks, max_steps=3, accumulate_grad_batches=2, logger=logger).fit(
        SmallNet(), loader()
    )
    events = EventAccumulator(str(tmp_path / "log"), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()
    own = {"loss_step", "loss_epoch", "loss", "accuracy", "epoch", "hp_metric"}
    logged = {t for kind in ("scalars", "histograms", "images") for t in tags[kind]} - own
    parts = {"LAYER": r"net\.\d[\w.]*", "MULTIPLE": r"[-\d.e]+", "/OF": r"(/gradient|/update|/noise|/net\.\d[\w.]*|)"}
    parts |= {"OF": "(gradient|update|noise)", "WHERE": "(input|output)"}
    patterns = {}
    for key in documented():
        pattern = re.escape(key)
        for part, values in parts.items():
            pattern = pattern.replace(part, values)
        patterns[key] = re.compile(pattern)
    unknown = {t for t in logged if not any(p.fullmatch(t) for p in patterns.values())}
    silent = {k for k, p in patterns.items() if not any(p.fullmatch(t) for t in logged)}
    assert not unknown, "logged, but not on the page"
    assert not silent, "on the page, but not logged"
    assert len(patterns) == 56


def test_a_figure_is_a_picture_in_tensorboard(tmp_path: Path) -> None:
    """The one that a report would draw of the sample."""
    logger = TensorBoardLogger(str(tmp_path), name="", version="log")
    trainer(str(tmp_path), callbacks=[ChannelMoments(2)], max_steps=2, logger=logger).fit(SmallNet(), loader())
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    tag = "channel_moments/channels_over_depth"
    assert tag in events.Tags()["images"]
    [logged] = events.Images(tag)
    assert logged.step == 0
    with Image.open(io.BytesIO(logged.encoded_image_string)) as image:
        shown = np.asarray(image.convert("RGB"))
    assert shown.shape[1] >= 900
    frame = load_run(tmp_path / "log")["channel_moments"]
    figure = next(f for f in ChannelMoments.figures if f.title == "Channels over depth")
    chart = draw_figure(figure, {"": frame[frame["step"] == 0]})
    assert chart is not None
    assert np.array_equal(shown, pixels(chart))
    assert (shown != 255).any(axis=2).mean() > 0.01  # with ink


# Earlier keys

CHANGED = "^log keys begin with the name of the measurement .*, which docs/log-keys.md lists beside the earlier$"


@pytest.fixture
def unwarned() -> Iterator[None]:
    warn_of_earlier_keys.cache_clear()
    yield
    warn_of_earlier_keys.cache_clear()


def fit(folder: Path, *callbacks: Measurement, **options: object) -> list[str]:
    """The warnings of a fit that are about log keys."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(str(folder), callbacks=[*callbacks], max_steps=3, **options).fit(SmallNet(), loader())
    return [str(w.message) for w in caught if "log keys" in str(w.message)]


@pytest.mark.usefixtures("unwarned")
def test_earlier_keys_are_logged_with_one_warning(tmp_path: Path) -> None:
    [message] = fit(tmp_path / "first", GradientTails(1), ChannelMoments(1))
    assert re.search(CHANGED, message)
    assert fit(tmp_path / "second", GradientTails(1)) == []  # one for the whole process
    header = (tmp_path / "first" / "log" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"gradient_tails/gradient/max/net.0.weight", "gradient/max/net.0.weight"} <= {*header}
    assert {"channel_moments/input/mean/net.1", "channel_input/mean/net.1"} <= {*header}


@pytest.mark.usefixtures("unwarned")
def test_without_loggers_or_earlier_keys_there_is_no_warning(tmp_path: Path) -> None:
    assert fit(tmp_path / "none", GradientTails(1), logger=False) == []
    assert fit(tmp_path / "dev", GradientTails(1), fast_dev_run=2) == []
    assert fit(tmp_path / "never", GradientTails(lambda step: False)) == []
    assert fit(tmp_path / "new", Divergence(rules=[LossAbove(1e-9)]), RelativeLoss(1)) == []


def warned_on_ranks(folder: str) -> None:
    import torch.distributed as dist

    found = fit(Path(folder), GradientTails(1), devices=2, strategy="ddp")
    assert len(found) == (dist.get_rank() == 0)


def test_rank_zero_alone_warns(tmp_path: Path) -> None:
    run_function(tmp_path, warned_on_ranks, 2, str(tmp_path))


@pytest.mark.usefixtures("unwarned")
def test_a_rehearsal_does_not_use_up_the_warning(tmp_path: Path) -> None:
    from normzoo.cli.rehearse import _undisturbed

    with _undisturbed():
        trainer(str(tmp_path / "a"), callbacks=[GradientTails(1)], max_steps=2).fit(SmallNet(), loader())
    assert len(fit(tmp_path / "b", GradientTails(1))) == 1
    with _undisturbed():
        trainer(str(tmp_path / "c"), callbacks=[GradientTails(1)], max_steps=2).fit(SmallNet(), loader())
    assert fit(tmp_path / "d", GradientTails(1)) == []


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for head, table in zip((TABLE, PARTS), tables(), strict=True):
        text = re.sub(rf"^{re.escape(head[0])}\n(\|.*\n)*", lambda _, table=table: f"{table}\n", text, flags=re.M)
    PAGE.write_text(text, encoding="utf-8")
