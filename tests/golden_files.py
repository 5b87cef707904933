"""Golden files: what fits have recorded, logged and saved, bit for bit, and how it is compared."""

from __future__ import annotations

import json
import platform
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Columns, log keys and states that have been renamed since the files were written: old -> new. A name is one or more
# whole parts of a path such as "record/log/gradient_tails/q999" or "log/gradient/kurtosis/net.0.weight/value".
RENAMED: dict[str, str] = (
    {
        f"{of}/{statistic}": f"gradient_tails/{of}/{statistic}"
        for of in ("gradient", "update", "noise")
        for statistic in ("kurtosis", "max", "l2", "tail_ratio", "alpha", "histogram")
    }
    | {
        f"channel_{where}/{statistic}": f"channel_moments/{where}/{statistic}"
        for where in ("input", "output")
        for statistic in ("mean", "variance", "dead", "mean_drift")
    }
    | {
        "figure/relative_loss/curve": "figure/relative_loss/relative_loss_along_the_step",
        "figure/channel/profile": "figure/channel_moments/channels_over_depth",
    }
)

RTOL = 1e-4  # of floats, on another processor or with other versions; of the value and of the series' median magnitude
ATOL = 1e-7  # rounding of figures that would be 0 in exact arithmetic, such as the mean after a normalization layer
# Figures that rounding moves further, as relative tolerances. The headroom is a crossing of two nearly flat lines.
# alpha is of a few values only, each known to the bucket that it is in.
LOOSE = {"headroom": 1e-2, "headroom_low": 1e-2, "alpha": 0.5}
# A value on the border of two buckets moves a quantile by a bucket, 2^-mantissa_bits of it; a ratio of two by both.
BUCKETED = {"q50": 1, "q99": 1, "q999": 1, "tail_ratio": 2}
# The change of a parameter by less than its last bit is 0 or not, as rounding has it: a count may differ by so many.
COUNTS = {"zeros": 2}


@dataclass(frozen=True)
class Series:
    """One column, one log key, or one value of a state.

    Args:
        kind: ``"float"``; ``"int"``; ``"text"``; or ``"checksum"``, which is compared only bit for bit.
        values: float64, int64, or strings.
    """

    kind: str
    values: np.ndarray


Recording = dict[str, Series]  # by path
Golden = dict[str, Recording]  # by fit


def floats(values: Iterable[Any]) -> Series:
    return Series("float", np.array([np.nan if v is None else v for v in values], dtype=np.float64))


def ints(values: Iterable[Any], kind: str = "int") -> Series:
    return Series(kind, np.array([int(v) for v in values], dtype=np.int64))


def texts(values: Iterable[Any]) -> Series:
    return Series("text", np.array([json.dumps(v) for v in values], dtype=object))


def checksum(*arrays: Any) -> int:
    """Of the bytes of arrays of numbers, without their shapes."""
    crc = 0
    for array in arrays:
        array = np.asarray(array)
        crc = zlib.crc32(np.ascontiguousarray(array, np.float64 if array.dtype.kind == "f" else np.int64), crc)
    return crc


def of_column(column: Any) -> dict[str, Series]:
    """The series of a data frame's column, by what is to be added to its path; a histogram is kept as its checksum."""
    values = list(column)
    if column.dtype.kind == "f":
        return {"": floats(values)}
    if column.dtype.kind in "iub":
        return {"": ints(values), "/dtype": texts([column.dtype.name])}
    arrays = [v for v in values if isinstance(v, np.ndarray)]
    if not arrays:
        return {"": texts(None if v != v else v for v in values)}
    if all(a.ndim == 2 for a in arrays):
        return {
            "/buckets": ints((len(a) for a in values), "checksum"),
            "/total": ints(a[:, 1].sum() for a in values),
            "/checksum": ints((checksum(a) for a in values), "checksum"),
        }
    return {"": floats(x for a in values for x in a), "/lengths": ints(len(a) for a in values)}


def of_state(state: Any, path: str) -> Recording:
    """The series of a state made of dictionaries, lists, numbers and strings; numbers in a list are one series."""
    if isinstance(state, Mapping):
        return {k: v for name, value in state.items() for k, v in of_state(value, f"{path}/{name}").items()}
    if isinstance(state, list | tuple):
        if state and all(isinstance(v, float) for v in state):
            return {path: floats(state)}
        found = {k: v for i, value in enumerate(state) for k, v in of_state(value, f"{path}/{i}").items()}
        return {**found, f"{path}/length": ints([len(state)])}
    if isinstance(state, bool) or state is None or isinstance(state, str):
        return {path: texts([state])}
    return {path: ints([state]) if isinstance(state, int) else floats([state])}


def machine() -> dict[str, str]:
    """The processor and the versions that the bits depend on."""
    import lightning
    import torch

    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    wanted = ("vendor_id", "model name", "cpu family", "model", "stepping")
    told = [m[1] for name in wanted if (m := re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE))]
    return {
        "processor": ", ".join(told) or f"{platform.machine()} {platform.processor()}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "numpy": np.__version__,
    }


def write(path: Path, golden: Golden) -> None:
    """One compressed file; each float stands in it once, however many series hold it."""
    series = [(fit, name, s) for fit, recording in golden.items() for name, s in recording.items()]
    parts = {kind: [s.values for *_, s in series if s.kind == kind] for kind in ("float", "int", "checksum", "text")}
    bits = np.concatenate([np.empty(0), *parts["float"]]).view(np.uint64)
    pool, places = np.unique(bits, return_inverse=True)
    strings, text_places = np.unique(np.concatenate([np.empty(0, object), *parts["text"]]), return_inverse=True)
    index: dict[str, Any] = {"machine": machine(), "strings": strings.tolist(), "fits": {}}
    for fit, name, s in series:
        index["fits"].setdefault(fit, {})[name] = [s.kind, len(s.values)]
    index["fits"] = {fit: index["fits"].get(fit, {}) for fit in golden}
    np.savez_compressed(
        path,
        index=np.frombuffer(json.dumps(index, indent=0).encode(), np.uint8),
        pool=pool,
        float=places.astype(np.uint32),
        int=np.concatenate([np.empty(0, np.int64), *parts["int"]]),
        checksum=np.concatenate([np.empty(0, np.int64), *parts["checksum"]]).astype(np.uint32),
        text=text_places.astype(np.uint32),
    )


def read(path: Path) -> tuple[dict[str, str], Golden]:
    """The machine that wrote a file, and what is in it."""
    with np.load(path, allow_pickle=False) as file:
        index = json.loads(file["index"].tobytes())
        arrays = {
            "float": file["pool"][file["float"]].view(np.float64),
            "int": file["int"],
            "checksum": file["checksum"].astype(np.int64),
            "text": np.array(index["strings"], dtype=object)[file["text"]],
        }
    start = dict.fromkeys(arrays, 0)
    golden: Golden = {}
    for fit, recording in index["fits"].items():
        golden[fit] = {}
        for name, (kind, length) in recording.items():
            golden[fit][name] = Series(kind, arrays[kind][start[kind] : start[kind] + length])
            start[kind] += length
    return index["machine"], golden


def renamed(path: str, names: Mapping[str, str] | None = None) -> str:
    """The path that a series has now."""
    for old, new in (names or {}).items():
        path = re.sub(rf"(?<![^/]){re.escape(old)}(?![^/])", lambda _, new=new: new, path)
    return path


def differences(
    old: Recording,
    new: Recording,
    exact: bool,
    rtol: float = RTOL,
    names: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """What is missing or differs in ``new``, one line for each series; more series than before are none.

    Args:
        old: from the golden file.
        new: of this run.
        exact: whether floats have to be the same bits; else they are compared within ``rtol`` and the tolerances above.
        rtol: of the fit.
        names: renamed parts of paths, old -> new; by default none is.
    """
    bits = min((s.values.min() for p, s in old.items() if p.endswith("/mantissa_bits") and len(s.values)), default=3)
    for path, a in old.items():
        b = new.get(renamed(path, names))
        if b is None:
            yield f"{path}: missing"
        elif a.kind != b.kind:
            yield f"{path}: {a.kind} before, {b.kind} now"
        elif len(a.values) != len(b.values):
            yield f"{path}: {len(a.values)} values before, {len(b.values)} now"
        elif a.kind == "checksum" and not exact:
            continue
        else:
            if a.kind == "int" and not exact:
                same = np.abs(a.values - b.values) <= COUNTS.get(path.split("/")[-1], 0)
            elif a.kind != "float":
                same = a.values == b.values
            elif exact:
                same = a.values.view(np.uint64) == b.values.view(np.uint64)
            else:
                same = _close(a.values, b.values, _tolerance(path, rtol, int(bits)), rtol)
            if not np.all(same):
                at = int(np.argmin(same))
                x, y = a.values[at], b.values[at]
                yield f"{path}[{at}]: {x} before, {y} now; {int(np.sum(~same))} of {len(same)} differ"


def _tolerance(path: str, rtol: float, bits: int) -> float:
    parts = path.split("/")
    found = [LOOSE[p] for p in parts if p in LOOSE] + [2.0**-bits * BUCKETED[p] for p in parts if p in BUCKETED]
    return max([rtol, *found])


def _close(a: np.ndarray, b: np.ndarray, rtol: float, of_typical: float) -> np.ndarray:
    finite = np.isfinite(a) & np.isfinite(b)
    typical = np.median(np.abs(a[np.isfinite(a)])) if np.isfinite(a).any() else 0.0
    with np.errstate(invalid="ignore"):
        near = np.abs(a - b) <= rtol * np.maximum(np.abs(a), np.abs(b)) + of_typical * typical + ATOL
    return np.where(finite, near, (a == b) | (np.isnan(a) & np.isnan(b)))
