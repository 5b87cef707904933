"""A callback used again, several of a class in one Trainer, and the folders of runs without a logger's."""

from __future__ import annotations

import inspect
import random
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callbacks_small import SmallNet, loader, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from ranks import run_ranks
from schemas import SCHEMAS
from watch_small import batch_loss, sgd, small_net, train

from normzoo import load_run, watch
from normzoo.callbacks import (
    ChannelMoments,
    Divergence,
    GradientNoise,
    GradientTails,
    LossAbove,
    LossSpike,
    RelativeLoss,
    Stop,
)
from normzoo.callbacks._run.record import new_folder
from normzoo.records.segments import Segment

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]
KINDS: dict[str, Any] = {
    "gradient_tails": GradientTails,
    "relative_loss": RelativeLoss,
    "channel_moments": ChannelMoments,
    "gradient_noise": lambda n, **options: GradientNoise(n, split=2, **options),
    "divergence": lambda _, **options: Divergence(rules=[LossAbove(1e-9)], **options),
}


class Scripted(SmallNet):
    """Its losses, one for each batch of its first epoch."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__(lr=0.0)
        self.losses = losses

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch[0]).sum() * 0 + self.losses[self.trainer.global_step]


def fit(folder: Path, callback: Any, losses: list[float], **options: Any) -> pl.Trainer:
    made = trainer(str(folder), callbacks=[callback], max_steps=len(losses), **options)
    made.fit(Scripted(losses), loader())
    return made


# A second fit


def test_a_second_run_is_judged_and_stopped_like_the_first(tmp_path: Path) -> None:
    callback = Divergence(action=Stop(None))
    for name, at in (("first", 2), ("second", 4)):
        losses = [1.0] * 10
        losses[at] = 5e3
        assert fit(tmp_path / name, callback, losses).global_step == at + 2
        assert (callback.step, callback.loss) == (at, 5e3)
        assert load_run(tmp_path / name / "log")["divergence"]["step"].tolist() == [at]
    fit(tmp_path / "third", callback, [1.0] * 5)
    assert (callback.step, callback.loss) == (None, None)
    assert load_run(tmp_path / "third" / "log")["divergence"].empty


def test_a_second_fit_of_the_same_trainer_goes_on(tmp_path: Path) -> None:
    callback, noise = Divergence(), GradientNoise(1, split=2)
    made = trainer(str(tmp_path), callbacks=[callback, noise], max_steps=4)
    net = Scripted([1.0, 5e3, 2.0, 3.0, 4.0, 6e3, 5.0, 6.0])
    made.fit(net, loader())
    assert callback.step == 1
    net.test_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    made.test(net, loader(), verbose=False)
    weight = noise.state_dict()["sums"][2]
    made.fit_loop.epoch_loop.max_steps = 8
    made.fit(net, loader())
    assert callback.step == 1  # the first of the run
    assert load_run(tmp_path / "log")["divergence"]["step"].tolist() == [1]
    assert noise.state_dict()["sums"][2] > weight > 0


def test_a_test_from_a_checkpoint_leaves_the_state_of_the_last_fit(tmp_path: Path) -> None:
    callback = Divergence(rules=[LossAbove(0.5)])
    net = SmallNet()
    net.test_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    early = trainer(str(tmp_path / "early"), callbacks=[callback], max_steps=1)
    early.fit(net, loader())
    early.save_checkpoint(tmp_path / "early.ckpt")
    before = callback.state_dict()
    late = trainer(str(tmp_path / "late"), callbacks=[callback], max_steps=3)
    late.fit(net, loader())
    state = callback.state_dict()
    assert state != before
    for judge in (late, trainer(str(tmp_path), callbacks=[callback])):
        judge.test(net, loader(), ckpt_path=tmp_path / "early.ckpt", weights_only=False, verbose=False)
        assert callback.state_dict() == state
    fit(tmp_path / "new", callback, [0.1] * 3)
    assert callback.step is None


def test_a_state_that_was_loaded_by_hand_is_kept_for_one_fit(tmp_path: Path) -> None:
    callback = Divergence(rules=[LossAbove(), LossSpike(3.0, window=3)])
    state = {"step": 7, "loss": 2e3, "rule": "threshold", "recent": [1.0, 1.1, 1.2]}
    callback.load_state_dict(state)
    fit(tmp_path / "first", callback, [1.0] * 2)
    assert callback.step == 7
    fit(tmp_path / "second", callback, [1.0] * 2)
    assert callback.step is None


def test_a_checkpoint_without_the_callback_starts_it_afresh(tmp_path: Path) -> None:
    other = trainer(str(tmp_path / "other"), max_steps=2)
    other.fit(SmallNet(), loader())
    other.save_checkpoint(tmp_path / "other.ckpt")
    callback = Divergence(rules=[LossAbove(1e-9)])
    trainer(str(tmp_path / "used"), callbacks=[callback], max_steps=2).fit(SmallNet(), loader())
    assert callback.step == 0
    resumed = trainer(str(tmp_path / "resumed"), callbacks=[callback], max_steps=4)
    resumed.fit(SmallNet(), loader(), ckpt_path=tmp_path / "other.ckpt", weights_only=False)
    assert callback.step == 2


def test_a_callback_in_a_second_watch_starts_afresh_and_re_entered_goes_on(tmp_path: Path) -> None:
    model, callback = small_net(), Divergence()
    optimizer = sgd(model)
    for name in ("first", "second"):
        with watch(model, optimizer, callback, dirpath=tmp_path / name) as watching:
            assert callback.step is None
            train(model, optimizer, watching, steps=3, losses={1: 5e3})
        with watching:
            assert callback.step == 1
            train(model, optimizer, watching, steps=3, losses={1: 6e3})
        assert load_run(tmp_path / name)["divergence"]["loss"].tolist() == [5e3]
    with watch(model, optimizer, callback, dirpath=tmp_path / "third", start_step=5) as watching:
        assert callback.step is None


# Several of a class


def test_several_of_a_class_have_records_keys_and_states_of_their_own(tmp_path: Path) -> None:
    """Interrupted after 4 of 8 steps and resumed, with the callbacks given in any order."""

    def callbacks() -> list[Any]:
        return [
            Divergence(rules=[LossAbove(3e3)]),
            Divergence(rules=[LossAbove()], label="low"),
            Divergence(rules=[LossAbove(2e3)], dirpath=str(tmp_path / "elsewhere")),
            GradientNoise(1, split=2),
            GradientNoise(1, split=4, label="quarters"),
        ]

    losses = [1.0, 1.5e3, 1.0, 2.5e3, 1.0, 3.5e3, 4e3, 1.0]
    folder = tmp_path / "run"
    first = trainer(str(folder), callbacks=callbacks(), max_steps=5)
    first.fit(Scripted(losses), loader())
    first.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=False)["callbacks"]
    elsewhere = f"Divergence{{'dirpath': {str(tmp_path / 'elsewhere')!r}}}"
    keys = {
        "Divergence",
        "Divergence{'label': 'low'}",
        elsewhere,
        "GradientNoise",
        "GradientNoise{'label': 'quarters'}",
    }
    assert saved.keys() == keys
    assert [saved[key]["step"] for key in ("Divergence", "Divergence{'label': 'low'}", elsewhere)] == [None, 1, 3]
    logged = {*(folder / "log" / "metrics.csv").read_text().splitlines()[0].split(",")}
    again = callbacks()
    random.Random(0).shuffle(again)
    second = trainer(str(folder), callbacks=again, max_steps=8)
    second.fit(Scripted(losses), loader(), ckpt_path=tmp_path / "saved.ckpt", weights_only=False)
    steps = {c.rules[0].threshold: c.step for c in again if isinstance(c, Divergence)}
    assert steps == {3e3: 5, 1e3: 1, 2e3: 3}
    for where, step in ((folder / "log", 5), (folder / "log" / "low", 1), (tmp_path / "elsewhere", 3)):
        assert load_run(where)["divergence"]["step"].tolist() == [step]
    assert load_run(folder / "log")["gradient_noise"]["step"].tolist() == list(range(8))
    assert load_run(folder / "log" / "quarters")["gradient_noise"]["gradients"].tolist() == [4] * 8
    logged |= {*(folder / "log" / "metrics.csv").read_text().splitlines()[0].split(",")}
    prefixes = {key.partition("divergence/loss")[0] for key in logged if key.endswith("divergence/loss")}
    assert prefixes == {"", "low/", "elsewhere/"}
    assert {"gradient_noise/scale", "quarters/gradient_noise/scale"} < logged
    assert {c.folder for c in again if isinstance(c, Divergence)} == {
        folder / "log",
        folder / "log" / "low",
        tmp_path / "elsewhere",
    }


@pytest.mark.parametrize("name", KINDS)
def test_twins_are_refused_at_setup(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    message = "would write the same record in the folder of the run, the one hiding the other; give one of them a label"
    with pytest.raises(ValueError, match=message):
        trainer(str(tmp_path), callbacks=[kind(2), kind(2)]).fit(SmallNet(), loader())
    with pytest.raises(ValueError, match=f"would write the same record in {tmp_path}.*; give one of them a label"):
        trainer(str(tmp_path), callbacks=[kind(2, dirpath=str(tmp_path)) for _ in range(2)]).fit(SmallNet(), loader())
    places = [kind(2, dirpath=str(tmp_path / one / "same")) for one in "abc"]
    with pytest.raises(ValueError, match="would log under the same keys; give one of them a label"):
        trainer(str(tmp_path), callbacks=places).fit(SmallNet(), loader())
    here = kind(2, dirpath=str(tmp_path / "run" / ".." / "log"))  # which only the logger knows
    with pytest.raises(ValueError, match=f"the same record in {tmp_path}/.*log"):
        trainer(str(tmp_path), callbacks=[kind(2), here]).fit(SmallNet(), loader())
    assert not list(tmp_path.glob("**/*-001.arrows"))


def test_one_of_a_class_has_its_class_name_in_checkpoints_whatever_its_arguments(tmp_path: Path) -> None:
    others = [Divergence(rules=[LossAbove(), LossSpike(5.0)], dirpath=str(tmp_path)) for _ in range(3)]
    fit(tmp_path / "a", others[0], [1.0] * 2)
    made = fit(tmp_path / "b", others[1], [1.0] * 2)
    made.save_checkpoint(tmp_path / "saved.ckpt")
    assert [*torch.load(tmp_path / "saved.ckpt", weights_only=False)["callbacks"]] == ["Divergence"]
    moved = Divergence(rules=[LossAbove(), LossSpike(5.0)], dirpath=str(tmp_path / "moved"))
    resumed = trainer(str(tmp_path / "c"), callbacks=[moved], max_steps=3)
    resumed.fit(Scripted([1.0, 1.0, 2.0]), loader(), ckpt_path=tmp_path / "saved.ckpt", weights_only=False)
    assert moved.state_dict()["recent"] == [1.0, 1.0, 2.0]


def test_state_keys_come_from_the_arguments_not_from_the_process() -> None:
    keys = [Divergence(label="a").state_key, Divergence(dirpath="b").state_key, Divergence(label="a").state_key]
    assert keys == ["Divergence{'label': 'a'}", "Divergence{'dirpath': 'b'}", "Divergence{'label': 'a'}"]
    twins = [GradientTails(label="twin") for _ in range(4)]
    assert len({twin.state_key for twin in twins}) == 4
    assert list(inspect.signature(Divergence).parameters)[1:4] == ["every_n_steps", "rules", "action"]


def test_a_callback_inside_of_another_is_set_up_like_one_of_the_trainer(tmp_path: Path) -> None:
    class Around(pl.Callback):
        inner = GradientTails(1, dirpath=str(tmp_path))

        def setup(self, *arguments: Any, **more: Any) -> None:
            self.inner.setup(*arguments, **more)

        def on_train_start(self, *arguments: Any) -> None:
            self.inner.on_train_start(*arguments)

        def on_before_optimizer_step(self, *arguments: Any) -> None:
            self.inner.on_before_optimizer_step(*arguments)

        def on_train_end(self, *arguments: Any) -> None:
            self.inner.on_train_end(*arguments)

    trainer(str(tmp_path / "run"), callbacks=[Around()], max_steps=2).fit(SmallNet(), loader())
    assert sorted({*load_run(tmp_path)["gradient_tails"]["step"]}) == [0, 1]


@pytest.mark.parametrize("label", ["", "a/b", "..", ".hidden", "two words", 3])
@pytest.mark.parametrize("name", KINDS)
def test_a_label_has_to_name_a_folder(name: str, label: Any) -> None:
    with pytest.raises(ValueError, match="label must be letters, digits"):
        KINDS[name](1, label=label)


@pytest.mark.parametrize("label", ["a" * 300, "ä" * 200])
@pytest.mark.parametrize("name", KINDS)
def test_a_label_longer_than_the_name_of_a_folder_is_refused(name: str, label: str) -> None:
    with pytest.raises(ValueError, match="label must be at most 255 bytes long, as it names a folder; .* has [34]00, "):
        KINDS[name](1, label=label)


@pytest.mark.parametrize("name", KINDS)
def test_the_longest_label_names_a_folder(tmp_path: Path, name: str) -> None:
    callback = KINDS[name](1, label="a" * 255, dirpath=str(tmp_path))
    (tmp_path / callback.label).mkdir()


@pytest.mark.parametrize(
    ("dirpath", "error", "message"),
    [
        (3, TypeError, "dirpath must be the path of a folder, .* or None for the default, not 3$"),
        (b"logs", TypeError, "not b'logs'$"),
        (
            "notes.txt",
            ValueError,
            "dirpath must be the path of a folder, existing or new, not 'notes.txt': .*notes.txt is",
        ),
        ("notes.txt/logs", ValueError, "not 'notes.txt/logs': .*notes.txt is not a folder; give another path$"),
        ("d" * 300, ValueError, "File name too long; give another path$"),
        ("a\0b", ValueError, "null"),
    ],
)
@pytest.mark.parametrize("name", [*KINDS, "watch"])
def test_a_dirpath_has_to_be_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dirpath: Any, error: type, message: str
) -> None:
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    model = small_net()
    made = partial(watch, model, sgd(model)) if name == "watch" else partial(KINDS[name], 1)
    with pytest.raises(error, match=message) as caught:
        made(dirpath=dirpath)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


# Folders


class Bare(Logger):
    """A logger without a folder for each run."""

    name, version = "bare", "0.1"  # type: ignore[assignment]

    def __init__(self, save_dir: str | None) -> None:
        super().__init__()
        self._save_dir = save_dir

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any) -> None: ...


@pytest.mark.parametrize("logger", [lambda: False, lambda: Bare(None), lambda: Bare("shared"), lambda: [Bare(".")]])
def test_without_a_folder_of_the_loggers_each_run_has_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for steps in (3, 1, 2):
        made = trainer(".", callbacks=[tails := GradientTails(1)], max_steps=steps, logger=logger())
        made.fit(SmallNet(), loader())
        root = Path(made.log_dir or made.default_root_dir)
        assert sorted({*load_run(root)["gradient_tails"]["step"]}) == list(range(steps))  # the newest
        assert tails.folder is not None
    assert not list(tmp_path.glob("*.arrows"))
    runs = [sorted({*load_run(root / "normzoo_logs" / f"version_{n}")["gradient_tails"]["step"]}) for n in range(3)]
    assert runs == [[0, 1, 2], [0], [0, 1]]
    assert tails.folder.resolve() == (root / "normzoo_logs" / "version_2").resolve()


def test_all_callbacks_of_a_run_and_its_second_fit_share_the_new_folder(tmp_path: Path) -> None:
    made = trainer(str(tmp_path), callbacks=[GradientTails(1), Divergence()], max_steps=2, logger=False)
    net = SmallNet()
    made.fit(net, loader())
    made.fit_loop.epoch_loop.max_steps = 4
    made.fit(net, loader())
    assert [p.name for p in (tmp_path / "normzoo_logs").iterdir()] == ["version_0"]
    frames = load_run(tmp_path)
    assert frames.keys() == {"gradient_tails", "divergence"}
    assert sorted({*frames["gradient_tails"]["step"]}) == [0, 1, 2, 3]


def test_a_loggers_own_folder_is_used(tmp_path: Path) -> None:
    for logger in (CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="board", sub_dir="sub")):
        for second in ([], [Bare(None)]):
            made = trainer(str(tmp_path), callbacks=[tails := GradientTails(1)], max_steps=1, logger=[logger, *second])
            made.fit(SmallNet(), loader())
            assert tails.folder == Path(logger.log_dir)
    assert not (tmp_path / "normzoo_logs").exists()


def test_nothing_is_made_where_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = trainer(".", callbacks=[tails := GradientTails(1)], logger=False, fast_dev_run=2)
    made.fit(SmallNet(), loader())
    assert tails.folder is None
    with pytest.raises(ValueError, match="no parameter matches"):
        trainer(".", callbacks=[GradientTails(parameters="none")], logger=False).fit(SmallNet(), loader())
    assert list(tmp_path.iterdir()) == []


def test_new_folders_are_numbered_after_the_last_and_never_shared(tmp_path: Path) -> None:
    (tmp_path / "version_7").mkdir()
    (tmp_path / "version_x").mkdir()
    assert [new_folder(tmp_path).name for _ in range(2)] == ["version_8", "version_9"]


def test_load_run_reads_the_newest_run_that_has_records(tmp_path: Path) -> None:
    for number in (9, 10, 11):
        folder = tmp_path / "normzoo_logs" / f"version_{number}"
        folder.mkdir(parents=True)
        if number == 9:
            (folder / "divergence-000.arrows").write_text("of an older run")
        elif number == 10:
            Segment(folder, SCHEMAS["divergence"], number)
    frame = load_run(tmp_path)["divergence"]
    assert frame.attrs["segments"] == 1
    with pytest.raises(FileNotFoundError, match="or without either into normzoo_logs/version_N"):
        load_run(tmp_path / "normzoo_logs")


def test_two_watches_have_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = small_net()
    optimizers = [torch.optim.SGD(model[:2].parameters(), lr=0.1), torch.optim.SGD(model[6].parameters(), lr=0.1)]
    first, second = (watch(model, optimizer, GradientTails(1)) for optimizer in optimizers)
    with first, second:
        batch_loss(model, next(iter(loader()))).backward()
        for optimizer in optimizers:
            optimizer.step()
    layers = [{*load_run(w.dirpath)["gradient_tails"]["layer"]} for w in (first, second)]
    assert layers == [{"0.weight", "1.weight", "1.bias"}, {"6.weight", "6.bias"}]


RANKS = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, os.environ["TESTS"])
from callbacks_small import SmallNet, loader, trainer
import lightning.pytorch as pl
from normzoo.callbacks import Divergence, GradientTails, LossAbove, Stop

class Net(SmallNet):
    def training_step(self, batch, batch_idx):
        high = self.global_rank == 1 and self.trainer.global_step == self.high
        return super().training_step(batch, batch_idx) * 0 + (5e3 if high else 1.0)

callbacks = [Divergence(action=Stop(None)), Divergence(rules=[LossAbove(9e3)], label="high"), GradientTails(1)]
seen = []
for run, high in enumerate((1, 3)):
    net = Net()
    net.high = high
    made = trainer(".", callbacks=callbacks, max_steps=6, strategy="ddp", devices=2, logger=False)
    made.fit(net, loader())
    made.save_checkpoint(f"saved{run}.ckpt")
    seen.append([made.global_step, str(callbacks[2].folder.resolve()), callbacks[0].step, callbacks[1].step])
torch.distributed.barrier()
from watch_small import sgd, small_net, train
from normzoo import watch
model = small_net()
optimizer = sgd(model)
with watch(model, optimizer, GradientTails(1)) as watching:
    train(model, optimizer, steps=2)
seen.append(str(watching.dirpath.resolve()))
torch.save(seen, f"rank{net.global_rank}.pt")
"""


def test_ranks_agree_on_the_folders_and_start_afresh_together(tmp_path: Path) -> None:
    run_ranks(tmp_path, RANKS, 2)
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(2)]
    assert ranks[0] == ranks[1]
    folders = [str(tmp_path / "normzoo_logs" / f"version_{n}") for n in range(3)]
    assert ranks[0] == [[3, folders[0], 1, None], [5, folders[1], 3, None], folders[2]]
    assert len(list((tmp_path / "normzoo_logs").iterdir())) == 3
    assert sorted({*load_run(folders[2])["gradient_tails"]["step"]}) == [0, 1]
    for run, step in ((0, 1), (1, 3)):
        assert load_run(folders[run])["divergence"]["step"].tolist() == [step]
        keys = torch.load(tmp_path / f"saved{run}.ckpt", weights_only=False)["callbacks"].keys()
        assert keys == {"Divergence", "Divergence{'label': 'high'}"}


def test_a_resumed_run_continues_its_record_without_a_seam(tmp_path: Path) -> None:
    """With ``dirpath`` in that folder; without a logger in a new one, which hides nothing of the first."""
    for dirpath in (None, str(tmp_path / "records")):
        root = tmp_path / ("default" if dirpath is None else "given")

        def run(steps: int, root: Path = root, dirpath: str | None = dirpath, **options: Any) -> None:
            saves = ModelCheckpoint(root, filename="{step}", every_n_train_steps=3, save_top_k=-1)
            callbacks = [GradientTails(1, dirpath=dirpath), saves]
            made = trainer(str(root), callbacks=callbacks, max_steps=steps, logger=False, enable_checkpointing=True)
            made.fit(SmallNet(), loader(), **options)

        run(5)
        run(7, ckpt_path=root / "step=3.ckpt", weights_only=False)
        folder = Path(dirpath) if dirpath else root / "normzoo_logs" / "version_1"
        expected = range(7) if dirpath else range(3, 7)
        assert sorted({*load_run(folder)["gradient_tails"]["step"]}) == [*expected]
    first = tmp_path / "default" / "normzoo_logs" / "version_0"
    assert sorted({*load_run(first)["gradient_tails"]["step"]}) == [0, 1, 2, 3, 4]
