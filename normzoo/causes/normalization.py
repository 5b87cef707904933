"""A normalization layer that divides by the root of eps, as a channel has no variance."""

from __future__ import annotations

from normzoo.causes.criteria import Criteria
from normzoo.causes.finding import Finding
from normzoo.causes.observations import Seen
from normzoo.causes.observations.network import dead_layers
from normzoo.causes.titles import NORM_LAYERS
from normzoo.causes.view import View, short

CRITERIA = Criteria(
    needs=("channel_dies", "channel_steers", "eps_saves"),
    points={
        "eps_saves": (4, -1),
        "channel_dies": (2, -1),
        "channel_steers": (2, -1),
        "batch_steep": (1, 0),
        "inputs_odd": (-1, 0),
        "updates_large": (-2, 0),
        "quiet_again": (-2, 0),
    },
    interventions=("eps_saves",),
)


def judge(view: View, seen: Seen) -> Finding | None:
    """The finding, if the cause is considered."""
    score = CRITERIA.score(seen)
    if score is None:
        return None
    row = _layer(view)
    name = row.text("module") if row.of("module") else view.text("trials", "eps", "module")
    about = [f"the variance of channel {row.text('channel')} is {short(row.number('variance'))}, below eps"]
    about[0] += f" ({short(row.number('eps'))}), so that eps decides what it is divided by" if row.of("eps") else ""
    if row.of("variance_quiet") is not None:
        about.append(f"at the quiet step it was {short(row.number('variance_quiet'))}")
    share, of_dead, dead = (row.number(key) for key in ("gradient", "gradient_of_dead", "dead"))
    if of_dead is not None and dead is not None and dead > 1:
        about.append(
            f"{short(dead)} of its {row.text('channels')} channels like it make up {of_dead:.0%} of its gradient"
        )
    elif share is not None:
        about.append(f"the channel makes up {share:.0%} of the gradient that the layer passes on")
    tried = view.number("trials", "eps", "eps")
    if seen["eps_saves"] is not None:
        about.append(
            f"with eps = {short(tried)} the same steps {'hold' if seen['eps_saves'] else 'do not hold either'}"
        )
    return Finding(
        "normalization",
        CRITERIA.confidence(seen),
        f"In {name} ({row.text('class')}) a channel has lost its variance: {'; '.join(about)}.",
        f"Refuted if the run diverges at these steps with a larger eps in {name} as well.",
        NORM_LAYERS,
        f"Raise eps of {name}{f', such as to {short(tried)}' if tried else ''}, and look for why channel "
        f"{row.text('channel')} is constant: a dead activation before it, a constant input, a batch of equal samples.",
        score,
    )


def _layer(view: View) -> View:
    """The layer of the trial, else the worst one with a channel that has died, else the worst."""
    tried = view.of("trials", "eps", "module")
    rows = [row for row in view.rows("norm_layers") if tried is not None and row.of("module") == tried]
    return next(iter([*rows, *dead_layers(view), *view.rows("norm_layers")]), View({}))
