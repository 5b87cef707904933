"""The runs of half c, of networks and optimizers that halves a and b do not use."""

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
    rewarded,
    tight,
    too_large,
    two,
)
from planted.plan import Plan, net

NESTEROV: dict[str, Any] = {"momentum": 0.95, "nesterov": True}
DECAY: dict[str, Any] = {**NESTEROV, "weight_decay": 1e-3}
BETAS: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}
QUICK: dict[str, Any] = {"betas": (0.8, 0.9), "weight_decay": 0.0}
PLAIN: dict[str, Any] = {"momentum": 0.0}


def runs_c() -> list[Plan]:
    """All runs of half c."""
    causes = (_data, _learning_rate, _warm_up, _normalization, _precision, _hardware, _parameter, _innocent, _two)
    return [plan for cause in causes for plan in cause()]


def _data() -> list[Plan]:
    """Samples that are not like the others, in one batch."""
    return [
        poison("c", net("vit", 201, "sgd", 5e-3, {"order": "none"}, own=NESTEROV), "scale", 34, (0, 2), 1e6),
        poison("c", net("convnext", 202, "nadam", 3e-3, clip=1.0, cosine=70), "scale", 47, (9, 12), -1e7),
        poison("c", net("tagger", 203, "adamw", 5e-3, own=BETAS), "label", 38, (150, 151), 5, ("error",)),
        poison("c", net("unet", 204, "adagrad", 0.03), "value", 43, (17, 18), float("nan")),
        poison("c", net("translator", 205, "adamw", 3e-3, {"order": "post"}, own=QUICK), "weight", 30, (4, 5), 1e6),
        poison("c", net("experts", 206, "nadam", 5e-3), "target", 52, (0, 1), -1e5),
        poison("c", net("siamese", 207, "sgd", 0.02, own=DECAY, accumulation=2), "scale", 27, (20, 22), 1e4),
        poison("c", net("flow", 208, "adamw", 2e-3, {"bound": 1.5}, own=QUICK), "value", 36, (11, 12), float("inf")),
        poison("c", net("graph", 209, "adagrad", 0.02, {"norm": "graph"}), "target", 41, (0, 3), 1e5),
        poison("c", net("scan", 210, "sgd", 2e-3, {"norm": "channels"}, own=PLAIN, clip=1.0), "scale", 23, 1, 1e5),
        poison("c", net("tagger", 211, "nadam", 5e-3, {"kind": "LSTM"}), "value", 49, (30, 31), float("nan")),
    ]


def _learning_rate() -> list[Plan]:
    """Learning rates that no warm-up makes hold: constant ones, after a jump of the schedule, rising."""
    return [
        too_large("c", net("vit", 212, "nadam", 2e-3, {"order": "none"}), {"lr": 0.3}),
        too_large("c", net("convnext", 213, "sgd", 0.02, own=NESTEROV), {"jump": (33, 100.0)}, 33),
        too_large("c", net("tagger", 214, "adamw", 5e-3, own=BETAS, clip=1.0), {"jump": (41, 300.0)}, 41),
        too_large("c", net("unet", 215, "sgd", 0.02, own=DECAY), {"rise": 1.15}),
        too_large("c", net("flow", 216, "adamw", 2e-3, {"bound": 2.0}, own=QUICK), {"lr": 1.0}),
        too_large("c", net("graph", 217, "sgd", 0.01, own=NESTEROV, accumulation=2), {"lr": 3.0}),
        too_large("c", net("experts", 218, "adagrad", 0.05), {"rise": 1.2}),
        too_large("c", net("scan", 219, "sgd", 2e-3, {"norm": "time"}, own=NESTEROV), {"lr": 0.3}),
    ]


def _warm_up() -> list[Plan]:
    """Learning rates that hold after a warm-up, for 100 steps more and with other seeds, and not from the start."""
    return [
        no_warm_up("c", net("flow", 231, "adamw", 0.05, own=QUICK), 50),
        no_warm_up("c", net("graph", 232, "adagrad", 0.8, {"norm": "none"}), 50),
        no_warm_up("c", net("siamese", 227, "adagrad", 0.8, {"norm": False}), 50),
        no_warm_up("c", net("flow", 222, "adagrad", 0.1), 50),
        no_warm_up("c", net("scan", 224, "adamw", 0.02, own=QUICK), 60),
        no_warm_up("c", net("graph", 229, "sgd", 0.8, {"norm": "none"}, own=NESTEROV), 50),
    ]


def _normalization() -> list[Plan]:
    """What becomes constant before a normalization whose eps is as good as none; with 0.001 all goes well."""
    return [
        dying("c", net("convnext", 226, "sgd", 0.01, {"norm": "batch"}, own=NESTEROV, prune=(35, 6)), 35),
        dying("c", net("convnext", 227, "sgd", 0.01, {"norm": "group", "gates": 4}, own=DECAY, prune=(29, 2)), 29),
        dying("c", net("tagger", 228, "sgd", 0.1, own=PLAIN, prune=(42, 0)), 42),
        dying(
            "c", net("convnext", 223, "sgd", 0.02, {"norm": "instance", "depth": 2}, own=NESTEROV, prune=(38, 11)), 38
        ),
        dying("c", net("graph", 230, "sgd", 0.05, own=NESTEROV, prune=(33, 5)), 33),
        dying("c", net("siamese", 231, "sgd", 0.01, own=DECAY, shrink=0.03, accumulation=2)),
        dying("c", net("scan", 232, "sgd", 0.01, {"norm": "time"}, own=PLAIN, prune=(31, 3)), 31),
    ]


def _precision() -> list[Plan]:
    """Float16 inside of the module, or the whole run, in which float32 holds."""
    return [
        coarse("c", net("vit", 233, "nadam", 1e-3, {"order": "post"}, drift=1.15), {"half": "scores"}),
        coarse("c", net("convnext", 234, "nadam", 1e-2, {"norm": "none"}), {"half": "logits"}),
        coarse("c", net("translator", 235, "adamw", 0.01, {"order": "none"}, own=QUICK), {"half": "exp"}),
        coarse("c", net("scan", 236, "adamw", 3e-3, own=BETAS, drift=1.03), {"half": "sums"}),
        coarse("c", net("experts", 237, "adagrad", 0.05, drift=1.05), {"half": "exp"}),
        coarse("c", net("vit", 238, "sgd", 0.02, {"order": "post"}, own=NESTEROV, drift=1.06), {"half": "exp"}),
        coarse("c", net("graph", 239, "adamw", 3e-3, own=BETAS), {"precision": "16-true"}),
    ]


def _hardware() -> list[Plan]:
    """A bit that flips between two steps, which replay is not told."""
    return [
        flip("c", net("vit", 240, "sgd", 0.02, own=NESTEROV), "parameter", 39, "layers.0.mlp.0.weight", 100, 30),
        flip("c", net("convnext", 241, "nadam", 3e-3), "exp_avg", 44, "narrow.1.weight", 50, 30),
        flip("c", net("tagger", 242, "adamw", 5e-3, own=BETAS), "parameter", 28, "norm.weight", 3, 30),
        flip("c", net("unet", 243, "sgd", 0.02, own=DECAY), "momentum_buffer", 36, "up.weight", 33, 30),
        flip("c", net("translator", 244, "adagrad", 0.03), "parameter", 50, "decoder.cross.query.weight", 9, 30),
        flip(
            "c",
            net("flow", 245, "adamw", 2e-3, own=QUICK, accumulation=2),
            "parameter",
            33,
            "couplings.2.0.weight",
            7,
            30,
        ),
        flip("c", net("graph", 246, "adamw", 3e-3, own=BETAS, clip=1.0), "exp_avg", 47, "message.0.weight", 40, 30),
    ]


def _parameter() -> list[Plan]:
    """One parameter that runs away: by its own learning rate, or by its gradient with nothing against it."""
    return [
        own_rate("c", net("unet", 247, "sgd", 0.02, own=NESTEROV), "contrast", 5000.0),
        own_rate("c", net("siamese", 248, "sgd", 0.01, own=NESTEROV), "reach", 300.0),
        rewarded("c", net("vit", 249, "sgd", 5e-3, {"order": "none"}, own=NESTEROV), bonus=50.0),
        rewarded("c", net("siamese", 250, "sgd", 0.01, own=NESTEROV), bonus=1.0),
        rewarded("c", net("translator", 251, "sgd", 0.05, own=NESTEROV), bonus=100.0),
        rewarded("c", net("graph", 252, "sgd", 0.01, own=NESTEROV), bonus=200.0),
    ]


def _innocent() -> list[Plan]:
    """A hard batch that the run survives, or an alarm by a tight rule in a healthy run."""
    return [
        hard("c", net("vit", 253, "adamw", 3e-3, own=BETAS, steps=110), "loss spike", "hard", 72, 32),
        hard("c", net("unet", 254, "nadam", 5e-3, steps=100), "loss spike", "hard", 48, 32),
        hard("c", net("graph", 255, "adagrad", 0.03, steps=100), "loss spike", "hard", 44, (8, 32)),
        hard("c", net("experts", 256, "nadam", 5e-3, steps=100), "loss spike", "hard", 51, (0, 20)),
        hard("c", net("convnext", 257, "nadam", 3e-3, steps=110), "loss spike", "noise", 65, (2, 14)),
        tight("c", net("flow", 258, "adamw", 2e-3, {"bound": 1.5}, own=QUICK), "small gradient spike"),
        tight("c", net("translator", 259, "adamw", 3e-3, own=BETAS), "small gradient spike"),
        tight("c", net("siamese", 260, "sgd", 0.02, own=NESTEROV), "small loss spike"),
    ]


def _two() -> list[Plan]:
    """Two causes at once, of which each alone raises an alarm."""
    return [
        two(
            "c",
            ("learning_rate", "data"),
            net("unet", 261, "sgd", 0.02, own=NESTEROV),
            {"jump": (37, 300.0)},
            {"poison": (("scale", 38, (5, 9), 1e5),)},
        ),
        two(
            "c",
            ("hardware", "data"),
            net("graph", 262, "adamw", 3e-3, own=BETAS),
            {"flip": (("parameter", 40, "own.0.weight", 12, 30),)},
            {"poison": (("target", 40, (3, 4), 1e6),)},
        ),
        two(
            "c",
            ("data", "learning_rate"),
            net("translator", 263, "nadam", 3e-3),
            {"poison": (("weight", 32, (30, 31), 1e6),)},
            {"jump": (32, 500.0)},
        ),
        two(
            "c",
            ("hardware", "learning_rate"),
            net("tagger", 264, "adamw", 5e-3, own=BETAS),
            {"flip": (("exp_avg", 43, "head.weight", 4, 30),)},
            {"jump": (44, 500.0)},
        ),
    ]
