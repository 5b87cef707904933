"""The runs of planted_divergences.py: those of halves a and b, to which runs_c.py and runs_d.py add c and d."""

from __future__ import annotations

from planted.kinds import (
    coarse,
    dying,
    flip,
    hard,
    no_warm_up,
    own_rate,
    poison,
    rare,
    rewarded,
    tight,
    too_large,
    two,
)
from planted.plan import Plan, net
from planted.runs_c import runs_c
from planted.runs_d import runs_d


def runs() -> list[Plan]:
    """All runs, those of half a first, those of half d last."""
    causes = (_data, _learning_rate, _warm_up, _normalization, _precision, _hardware, _parameter, _innocent, _two)
    plans = [plan for cause in causes for plan in cause()]
    return [*sorted(plans, key=lambda plan: plan.half), *runs_c(), *runs_d()]


def _data() -> list[Plan]:
    """Samples that are not like the others, in one batch."""
    return [
        poison("a", net("residual", 1, "sgd", 0.05), "scale", 40, 4, 1e6),
        poison("a", net("residual", 2, "adam", 3e-3, {"norm": "none"}, clip=1.0), "scale", 33, 1, -1e4),
        poison("a", net("series", 3, "adam", 3e-3), "target", 45, 1, 1e4),
        poison("a", net("table", 4, "adam", 1e-2), "value", 37, 1, float("inf")),
        poison("a", net("autoencoder", 5, "adamw", 3e-3), "value", 50, 2, float("nan")),
        poison("a", net("language", 6, "adamw", 3e-3, accumulation=2), "weight", 29, 1, 1e5),
        poison("a", net("residual", 7, "sgd", 0.05, {"norm": "group"}), "label", 41, 1, 10, ("error",)),
        poison("a", net("series", 8, "rmsprop", 1e-3, {"kind": "transformer"}), "scale", 26, 2, 1e5),
        poison("b", net("mixer", 51, "adamw", 1e-3, accumulation=2), "scale", 31, 8, 1e8),
        poison("b", net("residual", 52, "sgd", 0.05, {"norm": "group"}), "value", 44, 1, float("nan")),
        poison("b", net("series", 53, "adam", 1e-2, {"kind": "LSTM"}, clip=0.5), "target", 22, 1, 1e9),
        poison("b", net("table", 54, "rmsprop", 1e-3), "scale", 48, 1, 1e5),
        poison("b", net("language", 55, "adamw", 3e-3, {"order": "post"}), "label", 35, 1, 99, ("error",)),
        poison("b", net("autoencoder", 56, "adam", 3e-3, clip=1.0), "scale", 39, 3, 1e4),
        poison("b", net("pairs", 57, "adamw", 3e-3), "value", 28, 1, float("inf")),
        poison("b", net("residual", 58, "sgd", 0.02, {"norm": "none"}), "scale", 53, 3, -1e3),
    ]


def _learning_rate() -> list[Plan]:
    """Learning rates that no warm-up makes hold: constant ones, after a jump of the schedule, rising."""
    return [
        too_large("a", net("residual", 11, "sgd", 0.05), {"lr": 30.0}),
        too_large("a", net("residual", 12, "adam", 3e-3, {"norm": "none"}), {"lr": 0.3}),
        too_large("a", net("language", 13, "adamw", 3e-3), {"jump": (30, 100.0)}, 30),
        too_large("a", net("series", 14, "sgd", 0.05), {"jump": (35, 200.0)}, 35),
        too_large("a", net("autoencoder", 15, "adam", 3e-3), {"rise": 1.15}),
        too_large("a", net("table", 16, "sgd", 0.01, accumulation=2), {"lr": 1.0}),
        too_large("b", net("mixer", 61, "adamw", 1e-3, clip=1.0), {"lr": 20.0}),
        too_large("b", net("residual", 62, "sgd", 0.05, {"norm": "group"}), {"jump": (28, 60.0)}, 28),
        too_large("b", net("series", 63, "adam", 1e-3, {"kind": "transformer"}), {"jump": (40, 100.0)}, 40),
        too_large("b", net("series", 64, "rmsprop", 3e-3, {"kind": "LSTM"}), {"lr": 30.0}),
        too_large("b", net("table", 65, "adam", 1e-2, accumulation=2), {"rise": 1.2}),
        too_large("b", net("residual", 66, "sgd", 0.02, {"norm": "none"}), {"lr": 2.0}),
    ]


def _warm_up() -> list[Plan]:
    """Learning rates that hold after a warm-up, for 100 steps more and with another seed, and not from the start."""
    return [
        no_warm_up("a", net("residual", 17, "rmsprop", 0.06), 50),
        no_warm_up("a", net("series", 18, "rmsprop", 0.01, {"kind": "transformer", "order": "none"}), 50),
        no_warm_up("a", net("series", 19, "sgd", 0.15, {"kind": "transformer", "order": "none"}), 50),
        no_warm_up("a", net("autoencoder", 20, "rmsprop", 0.01), 40),
        no_warm_up("b", net("residual", 67, "rmsprop", 0.08, {"width": 16}), 60),
        no_warm_up("b", net("autoencoder", 68, "rmsprop", 0.01, {"hidden": 64}), 50),
        no_warm_up("b", net("table", 69, "rmsprop", 0.02), 40),
        no_warm_up("b", net("series", 70, "sgd", 0.2, {"kind": "transformer", "order": "none", "width": 32}), 60),
    ]


def _normalization() -> list[Plan]:
    """A channel that becomes constant before a normalization whose eps is as good as none; with 0.001 all goes well."""
    return [
        dying("a", net("residual", 21, "sgd", 0.02, prune=(36, 3)), 36),
        dying("a", net("residual", 22, "sgd", 0.02, {"norm": "instance"}, prune=(44, 5)), 44),
        dying("a", net("table", 23, "sgd", 0.01, shrink=0.02)),
        dying("a", net("residual", 24, "sgd", 0.02, {"depth": 4}, prune=(31, 7), accumulation=2), 31),
        rare("a", net("language", 25, "sgd", 0.05), 1e-16, 38),
        dying("b", net("residual", 71, "sgd", 0.03, {"width": 16}, prune=(27, 9)), 27),
        dying("b", net("residual", 72, "sgd", 0.03, {"norm": "instance", "depth": 2}, prune=(50, 1)), 50),
        dying("b", net("residual", 73, "sgd", 0.02, shrink=0.025)),
        dying("b", net("residual", 74, "sgd", 0.02, {"depth": 2}, prune=(41, 6), accumulation=2), 41),
        rare("b", net("language", 75, "sgd", 0.1, {"depth": 1}), 1e-16, 33),
    ]


def _precision() -> list[Plan]:
    """Float16 inside of the module, or the whole run, in which float32 holds."""
    return [
        coarse("a", net("residual", 31, "adam", 1e-2, {"norm": "none"}), {"half": "logits"}),
        coarse(
            "a",
            net("series", 32, "adam", 1e-3, {"kind": "transformer", "order": "post"}, drift=1.15),
            {"half": "scores"},
        ),
        coarse("a", net("series", 33, "adam", 3e-3, {"scaled": True}, drift=1.15), {"half": "squares"}),
        coarse("a", net("language", 34, "adamw", 3e-3), {"precision": "16-true"}),
        coarse("a", net("table", 35, "rmsprop", 3e-3), {"precision": "16-true"}),
        coarse("b", net("mixer", 81, "adamw", 3e-3), {"half": "logits"}),
        coarse("b", net("pairs", 82, "adamw", 1e-2, {"start": 2.66}), {"half": "logits"}),
        coarse("b", net("table", 83, "sgd", 1e-2, {"scaled": True}, drift=1.12), {"half": "squares"}),
        coarse("b", net("residual", 84, "adam", 3e-3, {"norm": "group"}), {"precision": "16-true"}),
        coarse(
            "b",
            net("series", 85, "adamw", 1e-3, {"kind": "transformer", "order": "post"}, drift=1.18, clip=1.0),
            {"half": "scores"},
        ),
    ]


def _hardware() -> list[Plan]:
    """A bit that flips between two steps, which replay is not told."""
    return [
        flip("a", net("residual", 41, "sgd", 0.05), "parameter", 37, "head.weight", 17, 30),
        flip("a", net("series", 42, "adam", 3e-3), "exp_avg", 43, "head.weight", 3, 30),
        flip("a", net("table", 43, "adam", 1e-2), "parameter", 29, "category.weight", 50, 30),
        flip("a", net("autoencoder", 44, "sgd", 0.05), "momentum_buffer", 47, "decoder.2.weight", 1234, 30),
        flip("a", net("language", 45, "adamw", 3e-3, accumulation=2), "parameter", 33, "token.weight", 200, 30),
        flip("b", net("mixer", 91, "adamw", 1e-3), "parameter", 25, "stem.weight", 77, 30),
        flip("b", net("series", 92, "adam", 1e-2, {"kind": "LSTM"}, clip=1.0), "exp_avg", 51, "head.weight", 5, 30),
        flip("b", net("residual", 93, "rmsprop", 1e-3, {"norm": "none"}), "parameter", 46, "first.1.weight", 700, 30),
        flip("b", net("residual", 94, "adamw", 3e-3, {"norm": "group"}), "exp_avg", 38, "second.2.weight", 301, 30),
        flip("b", net("mixer", 95, "sgd", 0.05), "momentum_buffer", 32, "head.weight", 99, 30),
    ]


def _parameter() -> list[Plan]:
    """One parameter that runs away: by its own learning rate, or by its gradient with nothing against it."""
    return [
        own_rate("a", net("mixer", 46, "sgd", 0.05), "head", 2000.0),
        rewarded("a", net("table", 47, "sgd", 0.02), bonus=3.0),
        own_rate("a", net("residual", 48, "sgd", 0.02, {"norm": "none"}), "gain", 300.0),
        rewarded("a", net("language", 49, "sgd", 0.05), bonus=400.0),
        own_rate("b", net("series", 96, "sgd", 0.02, {"kind": "LSTM"}), "head", 100.0),
        rewarded("b", net("table", 97, "sgd", 1e-2, {"norm": False}), bonus=4.0),
        own_rate("b", net("residual", 98, "sgd", 0.02, {"norm": "none", "depth": 4}, clip=5.0), "gain", 400.0),
        rewarded("b", net("table", 99, "sgd", 0.01, accumulation=2), bonus=5.0),
    ]


def _innocent() -> list[Plan]:
    """A hard batch that the run survives, or an alarm by a tight rule in a healthy run."""
    return [
        hard("a", net("residual", 101, "adam", 3e-3, {"norm": "group"}, steps=110), "loss spike", "hard", 60, 32),
        hard("a", net("series", 102, "adam", 3e-3, steps=100), "loss spike", "hard", 45, 16),
        hard("a", net("table", 103, "adam", 1e-2, steps=100), "loss spike", "hard", 40, 16),
        hard("a", net("residual", 104, "adam", 3e-3, {"norm": "group"}, steps=110), "loss spike", "noise", 60, 6),
        tight("a", net("autoencoder", 105, "adam", 3e-3), "small gradient spike"),
        tight("a", net("table", 106, "adam", 1e-2), "small loss spike"),
        hard("b", net("mixer", 151, "adamw", 2e-3, steps=110), "loss spike", "hard", 60, 32),
        hard("b", net("series", 152, "adam", 1e-2, {"kind": "LSTM"}, steps=100), "loss spike", "hard", 47, 24),
        hard("b", net("pairs", 153, "adamw", 3e-3, steps=100), "loss spike", "hard", 43, 32),
        hard("b", net("table", 154, "sgd", 0.01, steps=110), "loss spike", "noise", 55, 20),
        tight("b", net("residual", 155, "sgd", 0.05, {"norm": "group"}), "small gradient spike"),
        tight("b", net("language", 156, "adamw", 3e-3), "small gradient spike"),
    ]


def _two() -> list[Plan]:
    """Two causes at once, of which each alone raises an alarm."""
    return [
        two(
            "a",
            ("learning_rate", "data"),
            net("residual", 110, "sgd", 0.02, {"norm": "group"}),
            {"jump": (38, 100.0)},
            {"poison": (("scale", 39, 4, 1e5),)},
        ),
        two(
            "a",
            ("hardware", "data"),
            net("series", 111, "adam", 3e-3),
            {"flip": (("parameter", 42, "head.weight", 4, 30),)},
            {"poison": (("target", 42, 1, 1e6),)},
        ),
        two(
            "b",
            ("data", "hardware"),
            net("table", 160, "adam", 1e-2),
            {"poison": (("target", 36, 1, 1e7),)},
            {"flip": (("parameter", 38, "stem.weight", 20, 30),)},
        ),
        two(
            "b",
            ("learning_rate", "data"),
            net("mixer", 161, "adamw", 1e-3),
            {"jump": (30, 1000.0)},
            {"poison": (("value", 31, 2, float("nan")),)},
        ),
    ]
