"""How two tensors are compared, and the errors of a broken promise and of one that does not apply."""

from __future__ import annotations

import torch
from torch import Tensor


class BrokenError(Exception):
    """A promise is not kept; the text has the numbers."""


class NotApplicableError(Exception):
    """The layer or the machine lacks what the promise is about; the text says what."""


def describe(x: Tensor) -> str:
    """Shape, dtype and, where it is not the ordinary one, memory format."""
    form = ""
    if x.ndim in (4, 5) and not x.is_contiguous():
        last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        form = f", {str(last).removeprefix('torch.')}" if x.is_contiguous(memory_format=last) else ", strided"
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}{form}"


def agree(what: str, got: Tensor | None, want: Tensor | None, *, tolerance: float = 0.0) -> None:
    """Break unless no element is off by more than ``tolerance * max(1, largest expected magnitude)``.

    Args:
        what: which quantity, in which mode and of which input.
        got: what came out.
        want: what was expected.
        tolerance: 0 for equality.
    """
    if got is None or want is None:
        if got is not want:
            raise BrokenError(f"{what}: {_or_nothing(got)} came out, {_or_nothing(want)} was expected")
        return
    if got.shape != want.shape:
        raise BrokenError(f"{what}: shape {tuple(got.shape)} came out, {tuple(want.shape)} was expected")
    wide = torch.complex128 if got.is_complex() else torch.float64
    a, b = got.detach().to("cpu", wide), want.detach().to("cpu", wide)
    if a.numel() == 0:
        return
    finite = b[b.isfinite()].abs()
    bound = tolerance * max(1.0, finite.max().item() if finite.numel() else 0.0)
    difference = (a - b).abs()
    difference[(a == b) | (a.isnan() & b.isnan())] = 0
    difference[difference.isnan()] = float("inf")
    worst = int(difference.argmax())
    if difference.flatten()[worst] > bound:
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), a.shape))
        raise BrokenError(
            f"{what}: largest difference {difference.flatten()[worst]:.3g}, allowed {bound:.3g}; at {at} "
            f"{a.flatten()[worst].item():.8g} came out, {b.flatten()[worst].item():.8g} was expected ({describe(got)})"
        )


def finite(what: str, value: Tensor | None) -> None:
    """Break if a tensor holds an infinity or a NaN."""
    if value is not None and not value.isfinite().all():
        bad = int((~value.isfinite()).sum())
        raise BrokenError(f"{what}: {bad} of {value.numel()} values are not finite ({describe(value)})")


def _or_nothing(value: Tensor | None) -> str:
    return "nothing" if value is None else f"a tensor {describe(value)}"
