"""Measurements that the variable adds to Trainers, in fits of one process."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callbacks_small import SmallNet, TwoOptimizers, loader, trainer
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner  # type: ignore[attr-defined]
from plugin_small import added, install

import normzoo
from normzoo.callbacks import Action, ChannelMoments, Column, Divergence, GradientNorm, GradientTails, Measurement
from normzoo.records.reading import read_records
from normzoo.records.segments import Segment

COUNTING = f"{__name__}.Counting"


class Counting(Measurement):
    """Counts the steps that it was asked about, and keeps the count in its state."""

    name = "counting"
    columns = (Column("count", "int", "steps so far"),)
    reduce = None

    def __init__(self, every_n_steps: int = 1, *, fails_in: str = "", label: str | None = None) -> None:
        super().__init__(every_n_steps, label=label)
        self.count, self.fails_in, self.events = 0, fails_in, []  # type: ignore[var-annotated]

    def _event(self, name: str) -> None:
        self.events.append(name)
        if name == self.fails_in:
            raise ValueError(f"refused in {name}")
        if name == self.fails_in.removeprefix("error in "):
            raise KeyError(name)

    def check(self, run: Any) -> None:
        self._event("check")

    def start(self, run: Any) -> None:
        self._event("start")

    def measure(self, step: Any) -> dict[str, torch.Tensor]:
        self._event("measure")
        self.count += 1
        return {"count": torch.tensor(self.count)}

    def rows(self, sample: Any, values: Any) -> list[dict[str, Any]]:
        self._event("rows")
        return [{"count": values["count"].item()}]

    def told(self, run: Any, measurement: Any, sample: Any, rows: Any) -> None:
        self._event("told")

    def end(self, run: Any) -> None:
        super().end(run)
        self._event("end")

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def restore(self, state_dict: Any) -> None:
        self.count = state_dict["count"]
        self._event("restore")

    def forget(self) -> None:
        super().forget()
        self.count = 0


class InTheForward(Counting):
    """Listens to modules and gradients, and follows the update."""

    name = "in_the_forward"
    needs = frozenset({"activations", "backward", "update"})

    def sites(self, run: Any) -> Any:
        return {("net", "output"): run.module.net}

    def activation(self, step: Any, site: Any, module: Any, x: Any) -> Any:
        self._event("activation")

    def gradient(self, step: Any, name: Any, g: Any) -> None:
        self._event("gradient")

    def measure_update(self, step: Any) -> None:
        self._event("measure_update")


class Late(SmallNet):
    """Makes its layers in configure_model."""

    def configure_model(self) -> None:
        pass


class RaisesItsOwn(Action):
    """Ends training by an error of its own."""

    raises = stops = True

    def act(self, run: Any, alarm: Any) -> None:
        raise ArithmeticError(alarm.sentence)


class Fails(Action):
    """Does something beside training, which fails."""

    def act(self, run: Any, alarm: Any) -> None:
        raise OSError("no mail server")


def refusals(caught: Any) -> list[str]:
    return [str(w.message) for w in caught if str(w.message).startswith("NORMZOO")]


def fit(tmp_path: Path, module: Any = None, callbacks: Any = None, **options: Any) -> tuple[pl.Trainer, list[str]]:
    """A Trainer that has made a short fit, and what was said of the variable."""
    torch.manual_seed(0)
    checkpoint = options.pop("ckpt_path", None)
    made = trainer(str(tmp_path), callbacks=callbacks, **{"max_steps": 4, **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.fit(module or SmallNet(), loader(), ckpt_path=checkpoint, weights_only=False)
    return made, refusals(caught)


def fit_again(made: pl.Trainer, until: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the logger's folder
        made.fit_loop.epoch_loop.max_steps = until
        made.fit(made.lightning_module, loader())


def weights(made: pl.Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in made.lightning_module.parameters()]


def test_nothing_is_added_unless_the_variable_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    made, _ = fit(tmp_path)
    assert made.callbacks == []  # type: ignore[attr-defined]


def test_the_run_is_measured_and_is_the_same_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plain: list[torch.Tensor]
) -> None:
    install(monkeypatch, "gradient_tails:every_n_steps=2,divergence")
    measured, said = fit(tmp_path / "measured")
    assert said == []
    assert all(map(torch.equal, plain, weights(measured)))
    records = read_records(tmp_path / "measured" / "log")
    assert sorted(records) == ["divergence", "gradient_tails"]
    assert records["gradient_tails"]["step"].unique().tolist() == [0, 2]


@pytest.mark.parametrize("callbacks", [None, "one"])
def test_it_is_told_what_is_measured_and_where(
    callbacks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, "gradient_norm")
    given = None if callbacks is None else GradientNorm()
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, callbacks=given, max_steps=30)  # two epochs
    name, part = ("gradient_norm", "") if callbacks is None else ("gradient_norm (NORMZOO)", "NORMZOO")
    told = [r.getMessage() for r in caplog.records if "NORMZOO" in r.getMessage()]
    assert told == [f"NORMZOO measures {name}; normzoo report {tmp_path / 'log' / part}"]


def test_one_beside_that_of_the_script_has_a_folder_keys_and_a_state_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, "gradient_tails:every_n_steps=1,divergence")
    own, alone = GradientTails(every_n_steps=2), Divergence()
    made, said = fit(tmp_path, callbacks=[own, alone])
    assert said == []
    tails, divergence = added(made)
    assert (tails.label, divergence.label) == ("NORMZOO", "NORMZOO")
    assert (own.folder, alone.folder) == (tmp_path / "log", tmp_path / "log")
    assert (tails.folder, divergence.folder) == (tmp_path / "log" / "NORMZOO",) * 2
    assert own.state_key == "GradientTails"
    assert tails.state_key == "GradientTails{'asked_by': 'NORMZOO'}"
    assert (alone.state_key, divergence.state_key) == ("Divergence", "Divergence{'asked_by': 'NORMZOO'}")
    keys = (tmp_path / "log" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert any(key.startswith("gradient_tails/gradient/max/") for key in keys)
    assert any(key.startswith("NORMZOO/gradient_tails/gradient/max/") for key in keys)
    run = normzoo.load_run(tmp_path / "log")
    assert run["gradient_tails"]["step"].unique().tolist() == [0, 2]
    assert normzoo.load_run(tmp_path / "log" / "NORMZOO")["gradient_tails"]["step"].unique().tolist() == [0, 1, 2, 3]


def test_the_scripts_own_measure_the_same_whether_the_variable_is_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where they would use what another measurement knows, and by their names in checkpoints and logs."""

    def own(folder: str) -> tuple[Any, ...]:
        norm, divergence, apart = GradientNorm(), Divergence(), GradientTails(dirpath=str(tmp_path / folder / "apart"))
        made, _ = fit(tmp_path / folder, callbacks=[norm, divergence, apart], max_steps=2)
        fit_again(made, 4)
        keys = (tmp_path / folder / "log" / "metrics.csv").read_text().splitlines()[0].split(",")
        of_the_script = [key for key in keys if not key.startswith("NORMZOO")]
        rows = read_records(tmp_path / folder / "log")["gradient_norm"]
        return [c._key_in(made).replace(folder, "") for c in (norm, divergence, apart)], of_the_script, rows.to_csv()

    install(monkeypatch)
    plain = own("plain")
    install(monkeypatch, "gradient_tails,gradient_norm,divergence")
    assert own("measured") == plain


def test_a_script_without_gradient_norm_has_its_divergence_judge_no_norms_of_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, "gradient_norm,divergence")
    own = Divergence()
    made, _ = fit(tmp_path, callbacks=[own], max_steps=2)
    fit_again(made, 4)  # where the added ones are among the callbacks from the start
    assert not own._judges_norms
    assert added(made)[1]._judges_norms


def test_a_list_that_is_used_for_two_trainers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each Trainer is measured once, by instances of its own, under the same names in checkpoints."""
    install(monkeypatch, f"divergence,{COUNTING}")
    callbacks: list[Any] = [pl.Callback()]
    first = trainer(str(tmp_path / "first"), callbacks=callbacks, max_steps=3)
    assert len(callbacks) == 2  # Lightning has put ours there
    second = trainer(str(tmp_path / "second"), callbacks=callbacks, max_steps=5)
    third = trainer(str(tmp_path / "third"), callbacks=callbacks, max_steps=4)
    for made in (second, first, third):
        made.fit(SmallNet(), loader())
    for made, steps in ((first, 3), (second, 5), (third, 4)):
        divergence, counting = added(made)
        assert (type(divergence), counting.count) == (Divergence, steps)
        assert counting.state_key == "Counting{'asked_by': 'NORMZOO'}"
        assert len(read_records(Path(made.default_root_dir) / "log")["counting"]) == steps
    assert len({id(m) for made in (first, second, third) for m in added(made)}) == 6


def test_two_trainers_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, f"{COUNTING},divergence")

    class Nests(pl.Callback):
        inner: Any = None

        def on_train_batch_end(self, outer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.inner is None and batch_idx == 1:
                self.inner = trainer(str(tmp_path / "inner"), callbacks=shared, max_steps=3)
                self.inner.fit(SmallNet(), loader())

    nesting = Nests()
    shared: list[Any] = [nesting]
    outer, said = fit(tmp_path / "outer", callbacks=shared, max_steps=6)
    assert said == []
    assert [added(t)[0].count for t in (outer, nesting.inner)] == [6, 3]
    for folder, steps in (("outer", 6), ("inner", 3)):
        assert read_records(tmp_path / folder / "log")["counting"]["count"].tolist() == [*range(1, steps + 1)]


def test_a_second_fit_of_a_trainer_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, COUNTING)
    made, _ = fit(tmp_path, max_steps=3)
    [counting] = added(made)
    fit_again(made, 7)
    assert added(made) == [counting]
    assert counting.count == 7
    assert read_records(tmp_path / "log")["counting"]["step"].tolist() == [*range(7)]


def test_a_fit_after_one_that_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, COUNTING)

    class Fails(SmallNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2 and not self.calls > 4:
                self.calls = 9
                raise RuntimeError("of the script")
            return super().training_step(batch, batch_idx)

    made = trainer(str(tmp_path), max_steps=4)
    module = Fails()
    with pytest.raises(RuntimeError, match="of the script"):
        made.fit(module, loader())
    made.fit(module, loader())
    assert [c.count for c in added(made)] == [4]


def test_a_resumed_run_finds_its_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From a Trainer that had the list of another one, in one that has another list and a callback of the class."""
    install(monkeypatch, f"{COUNTING},divergence")
    shared: list[Any] = [Divergence()]
    trainer(str(tmp_path), callbacks=shared)
    first = trainer(str(tmp_path / "first"), callbacks=shared, max_steps=20)
    first.fit(SmallNet(), loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["callbacks"]
    assert {"Counting{'asked_by': 'NORMZOO'}", "Divergence{'asked_by': 'NORMZOO'}", "Divergence"} == {*saved}
    own = Counting()
    second, said = fit(tmp_path / "second", callbacks=[own], max_steps=23, ckpt_path=tmp_path / "last.ckpt")
    [counting, _] = added(second)
    assert (counting.label, counting.count, own.count) == ("NORMZOO", 23, 3)
    assert said == []


def test_a_run_resumed_without_the_variable_is_told_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, "divergence")
    first, _ = fit(tmp_path / "first", max_steps=20)
    first.save_checkpoint(tmp_path / "last.ckpt")
    install(monkeypatch)
    second = trainer(str(tmp_path / "second"), max_steps=22)
    with pytest.warns(UserWarning, match=r"Divergence\{'asked_by': 'NORMZOO'\}"):
        second.fit(SmallNet(), loader(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """The weights after a fit that is not measured."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        return weights(fit(tmp_path_factory.mktemp("plain"))[0])


@pytest.mark.parametrize("fails_in", ["check", "start", "measure", "rows", "told", "end", "error in measure"])
def test_one_that_fails_is_left_out_with_one_warning_and_training_goes_on(
    fails_in: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plain: list[torch.Tensor]
) -> None:
    install(monkeypatch, f"{COUNTING}:fails_in={fails_in},gradient_norm")
    made, said = fit(tmp_path)
    why = f"KeyError: '{fails_in[9:]}'" if fails_in.startswith("error") else f"refused in {fails_in}"
    assert said == [f"NORMZOO: training goes on without Counting: {why}"]
    assert [type(c) for c in added(made)] == [GradientNorm]
    assert all(map(torch.equal, plain, weights(made)))
    assert read_records(tmp_path / "log")["gradient_norm"]["step"].unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("fails_in", ["activation", "gradient", "measure_update"])
def test_one_that_fails_within_hooks_of_torch_is_left_out(
    fails_in: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, f"{__name__}.InTheForward:fails_in={fails_in}")
    made, said = fit(tmp_path)
    assert said == [f"NORMZOO: training goes on without InTheForward: refused in {fails_in}"]
    assert made.global_step == 4
    module: Any = made.lightning_module
    assert not module.net._forward_hooks
    assert not any(p._backward_hooks for p in module.parameters())


def test_the_same_measurement_in_the_script_ends_the_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, "gradient_norm")
    with pytest.raises(ValueError, match="refused in measure"):
        fit(tmp_path, callbacks=[Counting(fails_in="measure")])
    with pytest.raises(ValueError, match="refused in check"):
        fit(tmp_path, callbacks=[Counting(fails_in="check")])


def test_refusals_that_come_later_than_setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Layers that configure_model has made, no optimizer, no loss under manual optimization."""
    install(monkeypatch, f"{COUNTING}:fails_in=check")
    assert fit(tmp_path / "1", Late())[1] == ["NORMZOO: training goes on without Counting: refused in check"]

    class NoOptimizer(SmallNet):
        def configure_optimizers(self) -> Any:
            return None

    install(monkeypatch, "gradient_norm,divergence")
    made, said = fit(tmp_path / "2", NoOptimizer(), max_steps=-1, max_epochs=1)
    [told] = [text for text in said if text.startswith("NORMZOO")]
    assert told.startswith("NORMZOO: training goes on without GradientNorm: GradientNorm measures the steps of an opt")
    assert [type(c) for c in added(made)] == [Divergence]
    install(monkeypatch, "divergence")
    made, said = fit(tmp_path / "3", TwoOptimizers())
    assert said == [
        "NORMZOO: training goes on without Divergence: Divergence reads the loss that training_step returns; under "
        "manual optimization return {'loss': loss} from it"
    ]
    assert made.global_step == 4


def test_what_default_does_not_find_is_left_out_without_a_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Plain(SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.net[1] = torch.nn.Identity()

    install(monkeypatch, "default")
    made, said = fit(tmp_path, Plain())
    assert ([type(c) for c in added(made)], said) == ([GradientNorm, GradientTails], [])
    install(monkeypatch, "channel_moments")
    made, said = fit(tmp_path, Plain())
    assert (added(made), len(said)) == ([], 1)

    class NoOptimizer(Plain):
        def configure_optimizers(self) -> Any:
            return None

    install(monkeypatch, "default")
    made, said = fit(tmp_path, NoOptimizer(), max_steps=-1, max_epochs=1)
    assert (added(made), len(said)) == ([], 1)
    assert said[0].startswith("NORMZOO: no measurement of default fits this run: GradientNorm measures the steps of")
    install(monkeypatch, "channel_moments")
    made, said = fit(tmp_path, SmallNet())
    assert ([type(c) for c in added(made)], said) == ([ChannelMoments], [])


def test_an_alarm_that_is_to_end_the_run_ends_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Diverges(SmallNet):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (1e9 if batch_idx == 3 else 1)

    monkeypatch.chdir(tmp_path)
    install(monkeypatch, "watch.yaml")
    for action, error in (
        ("normzoo.callbacks.Raise", normzoo.callbacks.DivergenceError),
        ("normzoo.callbacks.Stop", normzoo.callbacks.DivergenceExit),
        (f"{__name__}.RaisesItsOwn", ArithmeticError),
    ):
        Path("watch.yaml").write_text(f"[{{name: divergence, recorder: false, action: {{class_path: {action}}}}}]")
        with pytest.raises(error):
            fit(tmp_path / action, Diverges(), max_steps=20)
    Path("watch.yaml").write_text(f"[{{name: divergence, recorder: false, action: {{class_path: {__name__}.Fails}}}}]")
    made, said = fit(tmp_path / "fails", Diverges(), max_steps=20)
    assert (said, added(made)) == (["NORMZOO: training goes on without Divergence: OSError: no mail server"], [])


def test_one_whose_record_fails_measures_on_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, f"{COUNTING},gradient_norm")
    written: list[int] = []

    def append(self: Segment, rows: Any) -> None:
        written.append(len(rows))
        if "count" in rows[0] and rows[0]["step"] == 2:
            raise OSError(28, "No space left on device")
        whole(self, rows)

    whole = Segment.append
    monkeypatch.setattr(Segment, "append", append)
    made, said = fit(tmp_path)
    told = "is not recorded from here on: OSError: [Errno 28] No space left on device"
    assert said == [f"NORMZOO: Counting {told}"]
    assert [type(c).__name__ for c in added(made)] == ["Counting", "GradientNorm"]
    assert added(made)[0].count == 4
    records = read_records(tmp_path / "log")
    assert records["counting"]["step"].tolist() == [0, 1]
    assert records["gradient_norm"]["step"].unique().tolist() == [0, 1, 2, 3]

    monkeypatch.setattr(Segment, "__init__", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    install(monkeypatch, COUNTING)
    made, said = fit(tmp_path / "unwritable")
    assert said == ["NORMZOO: Counting is not recorded from here on: PermissionError: [Errno 13] Permission denied"]
    assert added(made)[0].count == 4


def test_a_module_that_configures_the_same_measurement_keeps_it_beside_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Configures(SmallNet):
        def configure_callbacks(self) -> Any:
            return [GradientNorm()]

    install(monkeypatch, "gradient_norm")
    made, _ = fit(tmp_path, Configures(), max_steps=2)
    fit_again(made, 4)
    norms = [c for c in made.callbacks if type(c) is GradientNorm]  # type: ignore[attr-defined]
    assert sorted(c.label or "" for c in norms) == ["", "NORMZOO"]
    assert added(made)[0].label == "NORMZOO"


def test_options_of_the_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    install(monkeypatch, "gradient_norm,divergence")
    made, said = fit(tmp_path, fast_dev_run=True)
    assert (len(added(made)), said, [*tmp_path.rglob("*.arrows")]) == (2, [], [])
    bare = pl.Trainer(barebones=True, max_steps=2, accelerator="cpu", default_root_dir=str(tmp_path / "bare"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that log() does nothing then
        bare.fit(SmallNet(), loader())
    assert sorted(read_records(tmp_path / "bare" / "normzoo_logs" / "version_0")) == ["divergence", "gradient_norm"]
    made, _ = fit(tmp_path / "c", callbacks=[ModelCheckpoint(tmp_path / "saved")], enable_checkpointing=True)
    kinds = [type(c).__name__ for c in made.callbacks]  # type: ignore[attr-defined]
    assert kinds == ["AddedMeasurements", "GradientNorm", "Divergence", "ModelCheckpoint"]


def test_only_fits_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Validates(SmallNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("validated", self.net(batch[0]).mean())

    install(monkeypatch, "gradient_norm")
    made = trainer(str(tmp_path))
    made.validate(Validates(), loader(), verbose=False)
    assert [*tmp_path.rglob("*.arrows")] == []
    made.fit(Validates(), loader(), loader(16))
    made.validate(made.lightning_module, loader(16), verbose=False)
    assert read_records(tmp_path / "log")["gradient_norm"]["step"].nunique() == 20


def test_a_checkpoint_is_validated_without_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Validates(SmallNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("validated", self.net(batch[0]).mean())

    install(monkeypatch, f"divergence,{COUNTING}")
    made, _ = fit(tmp_path, Validates())
    made.save_checkpoint(tmp_path / "last.ckpt")
    other = trainer(str(tmp_path / "other"))
    other.validate(Validates(), loader(16), ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=False)
    assert added(other)[1].count == 0  # the state is for fits


@pytest.mark.filterwarnings("ignore:.*lr_find.*", "ignore:.*does not have many workers.*")
def test_tuning_is_not_measured_and_what_follows_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, COUNTING)
    made = trainer(str(tmp_path), max_steps=5)
    module = SmallNet()
    Tuner(made).lr_find(module, loader(), num_training=6, update_attr=False)
    made.fit(module, loader())
    [counting] = added(made)
    assert counting.count == 5
    assert read_records(tmp_path / "log")["counting"]["count"].tolist() == [1, 2, 3, 4, 5]
    within, said = fit(tmp_path / "within", callbacks=[LearningRateFinder(num_training_steps=6, update_attr=False)])
    assert ([c.count for c in added(within)], said) == ([4], [])


def test_an_entry_point_of_fabric_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric import Fabric

    install(monkeypatch, "gradient_tials")  # which is not looked at
    with pytest.warns(UserWarning, match=r"^NORMZOO is set, and Fabric calls too few hooks .*normzoo\.watch") as told:
        fabric = Fabric(accelerator="cpu", devices=1)
    assert (len(told), fabric._callbacks) == (1, [])
    install(monkeypatch)
    Fabric(accelerator="cpu", devices=1)


def test_pytorch_lightning_finds_it_as_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pytorch_lightning

    class Net(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(64, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    install(monkeypatch, "gradient_norm:every_n_steps=2,divergence")
    made = pytorch_lightning.Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )
    made.fit(Net(), loader())
    records = read_records(tmp_path / "normzoo_logs" / "version_0")
    assert records["gradient_norm"]["step"].unique().tolist() == [0, 2]
    assert [type(c) for c in added(made)] == [GradientNorm, Divergence]


def test_an_unset_variable_imports_two_small_modules_and_no_more() -> None:
    code = """
import sys
import normzoo
before = set(sys.modules)
from importlib import import_module
for function in ("trainer_callbacks", "fabric_callbacks"):
    assert getattr(import_module("normzoo.plugin"), function)() == []
more = sorted(set(sys.modules) - before - set(sys.stdlib_module_names))
print(more, "torch" in sys.modules, "yaml" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "['normzoo._variable', 'normzoo.plugin'] False False\n"
