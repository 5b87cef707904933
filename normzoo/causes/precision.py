"""Half precision: a number beyond its range, or too little resolution, where float32 holds."""

from __future__ import annotations

from normzoo.causes.criteria import Criteria
from normzoo.causes.finding import Finding
from normzoo.causes.observations import Seen
from normzoo.causes.titles import FIRST_BAD, TRIALS
from normzoo.causes.view import View, short

CRITERIA = Criteria(
    needs=("overflow", "float32_saves"),
    points={
        "float32_saves": (4, -3),
        "half_precision": (0, -6),
        "overflow": (2, -1),
        "float32_finite": (1, -3),
        "inputs_odd": (-3, 0),
        "rate_jumps": (-1, 0),
        "control_holds": (-1, 0),
        "quiet_again": (-2, 0),
    },
    interventions=("float32_saves", "float32_finite"),
)


def judge(view: View, seen: Seen) -> Finding | None:
    """The finding, if the cause is considered."""
    score = CRITERIA.score(seen)
    if score is None:
        return None
    module, dtype = view.of("first_bad", "module"), view.of("first_bad", "dtype")
    about = []
    if seen["overflow"]:
        about.append(
            f"in the {view.of('first_bad', 'direction')} pass of {module} ({view.of('first_bad', 'class')}) the "
            f"operation {view.of('first_bad', 'op')} in {dtype} is the first whose output is not finite; its largest "
            f"input is {short(view.number('first_bad', 'input_max'))}, and the largest {dtype} is "
            f"{short(view.number('first_bad', 'limit'), 5)}"
        )
    if seen["float32_finite"] is not None:
        about.append(f"in float32 the same pass is {'finite' if seen['float32_finite'] else 'not finite either'}")
    if seen["float32_saves"] is not None:
        about.append(f"the same steps in float32 {'hold' if seen['float32_saves'] else 'do not hold either'}")
    precision = view.of("about", "precision")
    where = f"{module} in float32 (torch.autocast(enabled=False) around it)" if seen["overflow"] else "in float32"
    return Finding(
        "precision",
        CRITERIA.confidence(seen),
        f"The precision {precision} does not suffice: {'; '.join(about)}.",
        "Refuted if a run in float32 diverges at these steps as well.",
        FIRST_BAD if seen["overflow"] else TRIALS,
        f"Compute {where}, or run in bf16-mixed, whose range is that of float32."
        if "bf16" not in str(precision)
        else f"Compute {where}.",
        score,
    )
