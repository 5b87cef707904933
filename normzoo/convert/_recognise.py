"""Which normalization a module computes, found by trying it: for classes that no table knows."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from normzoo.convert._behaviour import ELEMENTWISE, Behaviour, Observer, flat, layouts, noise
from normzoo.convert._families import Recognised, Unknown, close
from normzoo.convert._kinds import Source
from normzoo.convert._roles import Roles
from normzoo.convert._trial import MOST_VALUES, CannotBeTriedError, Trial, is_of_hooks, required_arguments, undisturbed
from normzoo.recognition import Kind

_SAME = 1e-12  # up to which two runs of one module on one input agree
_ROUNDED = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}  # relative errors of norms in these dtypes


def vectors_of(module: nn.Module) -> tuple[int, dict[str, Tensor]] | None:
    """C and the tensors of C values that a module holds itself; None where it cannot be a norm.

    A norm holds at least one vector of C > 1 values, besides single numbers no other tensors, and no submodules but
    activations, dropout and identities. Classes of torch that are no known norms are none.
    """
    of_torch = type(module).__module__.partition(".")[0] == "torch" and "forward" not in vars(module)
    if of_torch or not all(map(_is_trivial, module.children())):
        return None
    held = {n: t for n, t in {**module._parameters, **module._buffers}.items() if t is not None}
    if any(isinstance(t, UninitializedBuffer | UninitializedParameter) for t in held.values()):
        return None
    vectors = {n: t for n, t in held.items() if t.numel() != 1}
    sizes = {t.numel() for t in vectors.values()}
    if len(sizes) != 1 or any(t.numel() != max(t.shape, default=0) for t in vectors.values()):
        return None
    return sizes.pop(), vectors


def _is_trivial(module: nn.Module) -> bool:
    plain = isinstance(module, nn.Identity | nn.modules.dropout._DropoutNd) or _is_activation(module)
    return plain and not any(True for _ in module.children())


def _is_activation(module: nn.Module) -> bool:
    empty = not (module._parameters or module._buffers)
    return empty and type(module).__module__ == "torch.nn.modules.activation"


def recognise(module: nn.Module) -> Recognised | Unknown | None:
    """Try which norm a module is; None if it holds none of the tensors that a norm has.

    Args:
        module: any module; it is not changed.
    """
    found = vectors_of(module)
    if found is None:
        return None
    channels, vectors = found
    named = "norm" in type(module).__name__.lower()
    try:
        required, others = required_arguments(module)
        if len(required) != 1:
            wants = f"takes the arguments {', '.join(required)}" if required else "requires no argument"
            raise CannotBeTriedError(f"its forward {wants}, and a norm's takes one tensor")
        if channels * len(vectors) > MOST_VALUES:
            raise CannotBeTriedError(f"it holds more than {MOST_VALUES:,} values")
        acts = {n: m for n, m in module._modules.items() if m is not None and _is_activation(m)}
        with undisturbed():
            result = _solve(module, channels, vectors, acts)
    except CannotBeTriedError as reason:
        return Unknown(str(reason), named)
    if isinstance(result, Recognised) and others:
        return Unknown(
            f"{result.text}, but its forward may be given {', '.join(others)} too, with which it was not tried", True
        )
    if isinstance(result, Unknown) and named:
        return Unknown(result.text, True)
    return result


def _solve(
    module: nn.Module, channels: int, vectors: Iterable[str], acts: dict[str, nn.Module]
) -> Recognised | Unknown | None:
    """What a module is in float64; in float32 if it cannot be run in float64, or is another function there."""
    exact = _Case(module, channels, vectors, acts, torch.float64)
    result = exact.solve()
    if exact.of_its_dtype:
        rounded = _Case(module, channels, vectors, acts, torch.float32).solve()
        if isinstance(rounded, Recognised):
            return rounded
    return result


class Recogniser:
    """Tries modules, those of one class and with the same attributes once."""

    def __init__(self) -> None:
        self._results: dict[Any, Recognised | Unknown | None] = {}

    def __call__(self, module: nn.Module) -> Recognised | Unknown | None:
        """See :func:`recognise`."""
        key = _key(module)
        if key is None:
            return recognise(module)
        if key not in self._results:
            self._results[key] = recognise(module)
        return self._results[key]


def _key(module: nn.Module) -> Any:
    """What a module's formula depends on; None where that is not plain data."""
    data = {n: v for n, v in vars(module).items() if n not in _OF_MODULES and not is_of_hooks(n)}
    if any(module._modules.values()) or not all(_is_plain(v) for v in data.values()):
        return None
    held = {**module._parameters, **module._buffers}
    if any(t is not None and (t.is_meta or type(t.data) is not Tensor) for t in held.values()):
        return None
    tensors = [
        (n, n in module._buffers, t if t is None else (tuple(t.shape), t.dtype, t.item() if t.numel() == 1 else None))
        for n, t in held.items()
    ]
    return type(module), tuple(sorted(data.items())), tuple(tensors)


_OF_MODULES = {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool | torch.dtype)


def as_source(module: nn.Module, what: Recognised) -> Source:
    """What a recognised module is, as the tables of known classes would say it."""
    held = {**module._parameters, **module._buffers}
    tensors: dict[str, Tensor | None] = {"weight": None, "bias": None}
    remarks = list(what.remarks)
    for role, name in what.roles.items():
        tensor = held[name]
        assert tensor is not None  # it was seen to have a part in the output
        flat = tensor if tensor.ndim == 1 or role == "num_batches_tracked" else tensor.flatten()
        if role == "weight" and what.unit_offset:
            flat = (1 + tensor.detach().flatten()).requires_grad_(tensor.requires_grad)
            remarks.append(f"its weight is a new parameter of 1 + {name}: make optimizers anew")
        constant = {"weight": 1, "bias": 0}.get(role)
        if constant is not None and name in module._buffers and what.name != "frozen_batch":
            if bool((flat == constant).all()):
                continue
            remarks.append(f"its {role} was a buffer and is a parameter that is not trained")
        tensors[role] = flat
    kind = Kind(what.name, what.channel_dim)
    return Source(kind, what.channels, tensors, dict(what.options), dict(what.after), None, what.text, remarks)


class _Case:
    """One module on trial in one dtype."""

    def __init__(
        self,
        module: nn.Module,
        channels: int,
        vectors: Iterable[str],
        acts: dict[str, nn.Module],
        dtype: torch.dtype,
    ) -> None:
        self.module, self.acts, self.dtype = module, acts, dtype
        self.seen = Observer(module, channels, vectors, acts, dtype)
        self.run = self.seen.trial.run
        self.of_its_dtype = False  # whether another dtype may show another function

    def solve(self) -> Recognised | Unknown | None:
        """What the module is."""
        taken: list[tuple[int, tuple[int, ...]]] = []
        for dim, shape in layouts(self.seen.channels):
            if len(shape) == 5 and any(len(other) > 2 for _, other in taken):
                continue
            x = noise(shape, self.seen.generator)
            y = self.run(x)
            if self.seen.trial.mutates:
                return Unknown("it changes its input", True)
            if y is None:
                continue
            if not taken and not self.seen.is_odd(x) and all(self.seen.is_elementwise(x, t) for t in (False, True)):
                return ELEMENTWISE
            again = self.run(x)
            if again is None or not close(y, again, _SAME):
                return Unknown("its output in evaluation is random or depends on what it computed before", True)
            taken.append((dim, shape))
        if not taken:
            self.of_its_dtype = True
            return Unknown(f"it cannot be run on (N, C, ...) or (N, ..., C) input: {self.seen.trial.problem}", False)
        if self.seen.trial.halved:
            return Unknown("it computes in half precision, in which formulas cannot be told apart", True)
        outcomes: dict[int, Recognised | Unknown | None] = {}
        for dim, shape in taken:
            if dim not in outcomes and (len(shape) > 2 or not outcomes):
                outcomes[dim] = self._explain(dim, shape, [(d, s) for d, s in taken if d == dim or len(s) == 2])
        if isinstance(last := outcomes.get(-1), Recognised) and self._takes_rows(taken):
            return last
        if len(outcomes) > 1 and any(isinstance(o, Recognised) for o in outcomes.values()):
            looks = [
                f"with channels {'last' if dim == -1 else 'in dimension 1'} {o.text if o else 'a scale and shift'}"
                for dim, o in outcomes.items()
            ]
            return Unknown("; ".join(looks), True)
        return next((o for o in outcomes.values() if o is not None), None)

    def _takes_rows(self, taken: list[tuple[int, tuple[int, ...]]]) -> bool:
        """Whether the module views any input as rows of C values, by which its channels are always last."""
        for _, shape in taken:
            x = noise(shape, self.seen.generator)
            for training in (False, True):
                y, rows = self.run(x, training), self.run(x.reshape(-1, self.seen.channels), training)
                if y is None or rows is None or not close(y, rows.reshape(shape), self.seen.tolerance):
                    return False
        return True

    def _explain(
        self, dim: int, shape: tuple[int, ...], taken: list[tuple[int, tuple[int, ...]]]
    ) -> Recognised | Unknown | None:
        """What the module is if its channels are in one dimension, on inputs of all shapes that it takes."""
        x = noise(shape, self.seen.generator)
        y, again = self.run(x, True), self.run(x, True)
        if y is None or again is None:
            return Unknown(f"it cannot be run in training: {self.seen.trial.problem}", False)
        if not close(y, again, _SAME):
            return Unknown("its output in training is random, as with dropout or noise", True)
        evaluating, training = (self.seen.behaviours(x, dim, mode) for mode in (False, True))
        if other := training[0].other or evaluating[0].other:
            return other
        roles = Roles(self.module, self.seen, dim, x)
        pairs = [(t, e) for t, e in product(training, evaluating) if e.family in (None, t.family)]
        pairs = pairs or [(training[0], evaluating[0])]
        results = [(roles.named(t, e), t, e) for t, e in pairs]
        result, first, second = next((r for r in results if isinstance(r[0], Recognised)), results[0])
        if not isinstance(result, Recognised):
            return result
        modes = {True: first, False: second}
        small = max(modes[True].eps, 1e-16) ** 0.5
        for (side, other_shape), size, mode in product(taken, (1.0, 100.0, small), modes):
            z = noise(other_shape, self.seen.generator) * size
            y = self.run(z, mode)
            expected = modes[mode].predict(flat(z, side))
            if y is None or not close(flat(y, side), expected, self.seen.tolerance):
                when = "training" if mode else "evaluation"
                where = f"input of {len(other_shape)} dimensions and size {size:.0e}"
                return Unknown(f"it looks like {result.text}, but computes something else in {when} for {where}", True)
        for mode, behaviour in modes.items():
            if not self._follows_parameters(result, behaviour, x, dim, mode):
                return Unknown(f"it looks like {result.text}, but computes something else for large parameters", True)
        if not all(self._holds_in_own_dtype(result, modes[mode], x, dim, mode) for mode in modes):
            self.of_its_dtype = True
            return Unknown(f"in {self.dtype} it looks like {result.text}, but not in its own dtype", True)
        return self._with_activation(result, x)

    def _holds_in_own_dtype(self, result: Recognised, seen: Behaviour, x: Tensor, dim: int, training: bool) -> bool:
        """Whether the module computes the same, but for rounding, in the dtype of its tensors."""
        held = [t for t in (*self.module.parameters(), *self.module.buffers()) if t.is_floating_point()]
        own = held[0].dtype if held else torch.float32
        if own == self.dtype or own not in _ROUNDED:
            return True
        if seen.family is not None:
            seen = replace(seen, eps=result.options["eps"])
        trial = Trial(self.module, {name: nn.Identity() for name in self.acts}, own)
        self.seen.trial.restore()
        for name, tensor in trial.tensors().items():
            tensor.data.copy_(self.seen.trial.tensors()[name])
        trial.keep()
        small = max(seen.eps, 1e-16) ** 0.5
        for size in (1.0,) if own is torch.float16 else (1.0, small):
            z = (x * size).to(own)
            y = trial.run(z, training)
            if y is None:
                return own is not torch.float32  # which the CPU always has
            if not close(flat(y, dim), seen.predict(flat(z.double(), dim)), _ROUNDED[own]):
                return False
        return True

    def _follows_parameters(self, result: Recognised, seen: Behaviour, x: Tensor, dim: int, training: bool) -> bool:
        """Whether the module does the same with weight and bias 64 times as large, which shows bounds of its output."""
        old = {r: self.seen.values[result.roles[r]] if r in result.roles else None for r in ("weight", "bias")}
        weight, bias = old["weight"], old["bias"]
        plus = float(result.unit_offset)
        ratio = torch.ones_like(seen.scale) if weight is None else (plus + 64 * weight) / (plus + weight)
        base = torch.zeros_like(seen.shift) if bias is None else bias
        shift = (seen.shift - base) * ratio + 64 * base
        self.seen.trial.restore()
        for role, value in old.items():
            if value is not None:
                tensor = self.seen.trial.tensors()[result.roles[role]]
                tensor.data.copy_(64 * value.view(tensor.shape))
        y = self.run(x, training, fresh=False)
        large = Behaviour(seen.scale * ratio, shift, seen.family, seen.eps)
        return y is not None and close(flat(y, dim), large.predict(flat(x, dim)), self.seen.tolerance)

    def _with_activation(self, result: Recognised, x: Tensor) -> Recognised | Unknown:
        """The result with the module's activation, if it has one."""
        if not self.acts:
            return result
        (name, act), *more = self.acts.items()
        whole = Trial(self.module, dtype=self.dtype)
        self.seen.trial.restore()
        for key, tensor in whole.tensors().items():
            tensor.data.copy_(self.seen.trial.tensors()[key])
        whole.keep()
        plain, y = self.run(x), whole.run(x)
        if more or y is None or plain is None or not close(y, copy.deepcopy(act).eval()(plain), self.seen.tolerance):
            return Unknown(f"it looks like {result.text}, but its {name} is not what it applies in the end", True)
        result.after["act"] = act
        return result
