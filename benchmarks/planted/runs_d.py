"""The runs of half d, of networks and optimizers that halves a, b and c do not use."""

from __future__ import annotations

from typing import Any

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

DAMPED: dict[str, Any] = {"momentum": 0.9, "dampening": 0.5}
LIGHT: dict[str, Any] = {"momentum": 0.8, "weight_decay": 5e-4}
AMSGRAD: dict[str, Any] = {"amsgrad": True}
SLOW: dict[str, Any] = {"betas": (0.95, 0.999), "weight_decay": 1e-3}
CENTERED: dict[str, Any] = {"centered": True, "momentum": 0.5}


def runs_d() -> list[Plan]:
    """All runs of half d."""
    causes = (_data, _learning_rate, _warm_up, _normalization, _precision, _hardware, _parameter, _innocent, _two)
    return [plan for cause in causes for plan in cause()]


def _data() -> list[Plan]:
    """Samples that are not like the others, in one batch."""
    return [
        poison("d", net("dense", 301, "adamax", 1e-2), "scale", 41, (3, 6), 1e6),
        poison("d", net("excited", 302, "sgd", 0.02, own=DAMPED, stairs=30), "value", 38, (14, 15), float("nan")),
        poison("d", net("decoder", 303, "adam", 5e-3, own=AMSGRAD), "weight", 46, (7, 9), 1e6),
        poison("d", net("temporal", 304, "sgd", 0.05, own=LIGHT), "target", 29, (2, 4), 1e5),
        poison("d", net("cloud", 305, "radam", 1e-2), "label", 35, (19, 20), 7, ("error",)),
        poison("d", net("recommender", 306, "adamax", 1e-2, accumulation=3), "scale", 24, (5, 6), -1e6),
        poison(
            "d", net("perceiver", 307, "adam", 5e-3, own=SLOW, clip=0.1, clip_by="value"), "target", 51, (0, 1), 1e6
        ),
        poison("d", net("recommender", 308, "sgd", 0.05, own=LIGHT), "weight", 33, (21, 23), 1e6),
        poison("d", net("cloud", 309, "adam", 5e-3, own=AMSGRAD), "value", 44, (8, 10), float("inf")),
        poison("d", net("temporal", 310, "radam", 5e-3, {"norm": "none"}), "scale", 55, (10, 11), 1e5),
    ]


def _learning_rate() -> list[Plan]:
    """Learning rates that no warm-up makes hold: constant ones, after a jump of the schedule, rising."""
    return [
        too_large("d", net("dense", 311, "sgd", 0.02, {"norm": "none"}, own=LIGHT), {"jump": (37, 200.0)}, 37),
        too_large("d", net("excited", 312, "adamax", 5e-3), {"jump": (31, 1000.0)}, 31),
        too_large("d", net("decoder", 313, "sgd", 0.05, own=DAMPED), {"lr": 30.0}),
        too_large("d", net("temporal", 314, "adam", 5e-3, own=AMSGRAD), {"lr": 1.0}),
        too_large("d", net("cloud", 315, "rmsprop", 1e-3, own=CENTERED), {"jump": (39, 1000.0)}, 39),
        too_large("d", net("recommender", 316, "sgd", 0.05, own=DAMPED, accumulation=3), {"lr": 30.0}),
        too_large("d", net("perceiver", 317, "adamax", 5e-3, {"order": "none"}), {"rise": 1.15}),
        too_large("d", net("perceiver", 318, "sgd", 0.05, own=LIGHT, stairs=25), {"jump": (44, 300.0)}, 44),
    ]


def _warm_up() -> list[Plan]:
    """Learning rates that hold after a warm-up, for 100 steps more and with other seeds, and not from the start."""
    return [
        no_warm_up("d", net("cloud", 411, "rmsprop", 0.03, own=CENTERED), 60),
        no_warm_up("d", net("temporal", 405, "sgd", 0.2, {"width": 24, "depth": 5}, own=LIGHT), 60),
        no_warm_up("d", net("perceiver", 410, "sgd", 0.4, {"order": "none", "turns": 3}, own=LIGHT), 50),
        no_warm_up("d", net("temporal", 325, "sgd", 0.3, own=DAMPED), 50),
        no_warm_up("d", net("perceiver", 326, "sgd", 0.5, {"order": "none", "turns": 3}, own=DAMPED), 60),
    ]


def _normalization() -> list[Plan]:
    """What becomes constant before a normalization whose eps is as good as none; with 0.001 all goes well."""
    return [
        dying("d", net("dense", 331, "sgd", 0.05, own=DAMPED, prune=(36, 4)), 36),
        dying("d", net("dense", 332, "sgd", 0.05, {"depth": 3}, own=LIGHT, prune=(40, 2)), 40),
        dying("d", net("recommender", 333, "sgd", 0.05, own=DAMPED, prune=(28, 3)), 28),
        dying("d", net("cloud", 334, "sgd", 0.05, own=LIGHT, prune=(45, 10)), 45),
        rare("d", net("decoder", 336, "sgd", 0.1, {"last": False}, own=LIGHT), 1e-16, 39),
        dying("d", net("recommender", 337, "sgd", 0.02, own=LIGHT, shrink=0.025, accumulation=3)),
    ]


def _precision() -> list[Plan]:
    """Float16 inside of the module, or the whole run, in which float32 holds."""
    return [
        coarse("d", net("dense", 341, "adamax", 0.05, {"norm": "none"}), {"half": "logits"}),
        coarse("d", net("temporal", 342, "adam", 5e-3, {"norm": "instance"}, own=AMSGRAD, drift=1.2), {"half": "sums"}),
        coarse("d", net("cloud", 343, "sgd", 0.05, own=DAMPED, drift=1.12), {"half": "squares"}),
        coarse("d", net("recommender", 344, "adamax", 2e-2, {"sharp": 3.0}), {"half": "softplus"}),
        coarse("d", net("perceiver", 345, "radam", 5e-3, {"order": "post"}, drift=1.06), {"half": "exp"}),
        coarse("d", net("decoder", 346, "adam", 5e-3, own=AMSGRAD), {"precision": "16-true"}),
    ]


def _hardware() -> list[Plan]:
    """A bit that flips between two steps, which replay is not told."""
    return [
        flip("d", net("dense", 351, "adamax", 1e-2), "parameter", 42, "growths.2.weight", 60, 30),
        flip("d", net("excited", 352, "sgd", 0.05, own=DAMPED), "momentum_buffer", 35, "head.weight", 30, 30),
        flip("d", net("decoder", 353, "adam", 5e-3, own=AMSGRAD), "parameter", 48, "head.weight", 90, 30),
        flip("d", net("temporal", 354, "radam", 1e-2), "exp_avg", 39, "head.weight", 2, 30),
        flip("d", net("cloud", 355, "adamax", 1e-2), "exp_avg", 31, "whole.0.weight", 90, 30),
        flip(
            "d",
            net("recommender", 356, "sgd", 0.05, own=LIGHT, accumulation=3),
            "parameter",
            27,
            "thing.weight",
            11,
            30,
        ),
        flip("d", net("perceiver", 357, "adam", 5e-3, own=SLOW), "parameter", 52, "mlp.0.weight", 200, 30),
    ]


def _parameter() -> list[Plan]:
    """One parameter that runs away: by its own learning rate, or by its gradient with nothing against it."""
    return [
        own_rate("d", net("dense", 361, "sgd", 0.02, {"norm": "none"}, own=DAMPED), "temper", 1e5),
        own_rate("d", net("temporal", 362, "sgd", 0.05, own=LIGHT), "volume", 300.0),
        own_rate("d", net("excited", 363, "sgd", 0.02, own=DAMPED), "lift", 3000.0),
        rewarded("d", net("recommender", 364, "sgd", 0.05, {"norm": False}, own=LIGHT, accumulation=3), bonus=40.0),
        rewarded("d", net("recommender", 365, "sgd", 0.05, own=DAMPED), bonus=30.0),
        rewarded("d", net("perceiver", 366, "sgd", 0.05, own=LIGHT), bonus=60.0),
    ]


def _innocent() -> list[Plan]:
    """A hard batch that the run survives, or an alarm by a tight rule in a healthy run."""
    return [
        hard("d", net("excited", 371, "adam", 5e-3, own=AMSGRAD, steps=110), "loss spike", "hard", 72, 32),
        hard("d", net("temporal", 372, "adam", 5e-3, own=AMSGRAD, steps=100), "loss spike", "hard", 46, (4, 32)),
        hard("d", net("cloud", 373, "radam", 2e-2, steps=110), "loss spike", "hard", 70, 32),
        hard("d", net("perceiver", 374, "adamax", 1e-2, steps=110), "loss spike", "hard", 61, (0, 24)),
        hard("d", net("decoder", 375, "adam", 1e-2, own=AMSGRAD, steps=110), "loss spike", "hard", 74, 32),
        tight("d", net("recommender", 376, "adamax", 1e-2), "small gradient spike"),
        tight("d", net("excited", 377, "adam", 5e-3, own=AMSGRAD), "small gradient spike"),
        tight("d", net("recommender", 378, "sgd", 0.05, own=DAMPED), "small loss spike"),
    ]


def _two() -> list[Plan]:
    """Two causes at once, of which each alone raises an alarm."""
    return [
        two(
            "d",
            ("data", "hardware"),
            net("cloud", 381, "adamax", 1e-2),
            {"poison": (("value", 36, (1, 2), float("nan")),)},
            {"flip": (("parameter", 36, "point.0.weight", 25, 30),)},
        ),
        two(
            "d",
            ("learning_rate", "data"),
            net("temporal", 382, "sgd", 0.05, own=DAMPED),
            {"jump": (40, 500.0)},
            {"poison": (("target", 41, (6, 9), 1e5),)},
        ),
        two(
            "d",
            ("hardware", "learning_rate"),
            net("decoder", 383, "adamax", 1e-2),
            {"flip": (("exp_avg", 33, "head.weight", 15, 30),)},
            {"jump": (34, 1000.0)},
        ),
        two(
            "d",
            ("data", "learning_rate"),
            net("recommender", 384, "adam", 5e-3, own=AMSGRAD),
            {"poison": (("weight", 45, (3, 4), 1e6),)},
            {"jump": (45, 1000.0)},
        ),
    ]
