"""Which tensors of a module on trial are weight, bias and running statistics, by their values."""

from __future__ import annotations

from itertools import pairwise, product

import torch
from torch import Tensor, nn

from normzoo.convert._behaviour import Behaviour, Observer, flat
from normzoo.convert._families import Recognised, Unknown, close

_NO_EPS = 1e-24  # in place of 0, which makes zeros of padding not-a-number


class Roles:
    """Names what an observer saw of a module.

    Args:
        module: the module.
        seen: who saw it.
        dim: of its channels.
        x: an input that the module takes.
    """

    def __init__(self, module: nn.Module, seen: Observer, dim: int, x: Tensor) -> None:
        self.module, self.seen, self.dim, self.x = module, seen, dim, x
        self.near = 10 * seen.tolerance

    def named(self, training: Behaviour, evaluating: Behaviour) -> Recognised | Unknown | None:
        """The norm that behaves so in the two modes; None for a scale and shift without statistics."""
        family = training.family
        differs = Unknown(f"in training it looks like {training.text}, in evaluation like {evaluating.text}", True)
        if family is None:
            given = flat(self.x, self.dim)
            same = close(training.predict(given), evaluating.predict(given), self.seen.tolerance)
            return self._frozen(evaluating) if evaluating.family is None and same else differs
        if evaluating.family != family and not (family.name == "batch" and evaluating.family is None):
            return differs
        looks = f"it looks like {family.text}"
        if family.name is None:
            return Unknown(f"{looks}, which is no layer of the zoo", True)
        weight, bias = self._tensor(training.scale, 1.0), self._tensor(training.shift, 0.0)
        if weight is None or bias is None:
            return Unknown(f"{looks}, but its {'scale' if weight is None else 'shift'} is no tensor of its own", True)
        roles = {role: name for role, name in (("weight", weight[0]), ("bias", bias[0])) if name}
        made = Recognised(family.name, self.dim, self.seen.channels, roles, weight[1], {"eps": self._eps(training)})
        if family.name == "group":
            made.options["groups"] = family.groups
        if family.name == "positional":
            made.options["unbiased"] = True
        if evaluating.family is None and (problem := self._running(made, training, evaluating)):
            return Unknown(f"{looks}, but {problem}", True)
        if rest := self._rest(made.roles):
            return Unknown(f"{looks}, but {rest}", True)
        scale = "no scale" if not weight[0] else f"scale {'1 + ' * weight[1]}{weight[0]}"
        shift = f", shift {bias[0]}" if bias[0] else ""
        where = "last" if self.dim == -1 else "in dimension 1"
        made.text = f"{family.text}, channels {where}, {scale}{shift}, eps={training.eps:.3g}"
        return made

    def _eps(self, behaviour: Behaviour) -> float:
        """The eps for the new layer."""
        eps = behaviour.eps
        if abs(eps - torch.finfo(torch.float64).eps) < 1e-3 * eps:  # that of the input's dtype, as in torch's rms_norm
            tensors = [t for t in (*self.module.parameters(), *self.module.buffers()) if t.is_floating_point()]
            return torch.finfo(torch.promote_types(tensors[0].dtype, torch.float32)).eps
        return eps or _NO_EPS

    def _tensor(self, value: Tensor, constant: float) -> tuple[str, bool] | None:
        """(name, whether 1 is added) of the tensor with these values, no name for the constant; else None."""
        if close(value, torch.full_like(value, constant), self.near, 1.0):
            return "", False
        for name, held in self.seen.values.items():
            if close(value, held, self.near):
                return name, False
            if constant and close(value, 1 + held, self.near):
                return name, True
        return None

    def _rest(self, roles: dict[str, str]) -> str | None:
        """What is said of a parameter that has no role; None if there is none."""
        owned = {id(self.module._parameters.get(name)) for name in roles.values()}
        rest = [n for n, p in self.module._parameters.items() if p is not None and id(p) not in owned]
        return f"its parameter {rest[0]} would be lost" if rest else None

    def _running(self, made: Recognised, training: Behaviour, evaluating: Behaviour) -> str | None:
        """Find running statistics and how they move; what is said if that is not as in batch norm."""
        for name, held in self.seen.values.items():
            if name in made.roles.values():
                continue
            if close(evaluating.scale * (held + training.eps).clamp(min=0).sqrt(), training.scale, self.near):
                made.roles["running_var"] = name
            elif close(training.shift - held * evaluating.scale, evaluating.shift, self.near, 1.0):
                made.roles["running_mean"] = name
        if not {"running_mean", "running_var"} <= made.roles.keys():
            return "it evaluates by other statistics than a running mean and variance"
        states = [{role: self.seen.values[made.roles[role]] for role in ("running_mean", "running_var")}]
        batches = [self.x, 0.1 * self.x]
        for i, x in enumerate(batches):
            self.seen.trial.run(x, True, fresh=i == 0)
            now = self.seen.trial.tensors()
            states.append({role: now[made.roles[role]].flatten().to(torch.float64, copy=True) for role in states[0]})
        rates, unbiased = [], {True, False}
        for x, (a, b) in zip(batches, pairwise(states), strict=True):
            var, mean = torch.var_mean(flat(x, self.dim), (0, 2), correction=0)
            count = x.numel() // len(mean)
            rate = float(((b["running_mean"] - a["running_mean"]) / (mean - a["running_mean"])).median())
            rates.append(rate)
            if not close(a["running_mean"].lerp(mean, rate), b["running_mean"], self.near, 1.0):
                unbiased = set()
            targets = {True: var * count / (count - 1), False: var}
            moved = {kind: a["running_var"].lerp(target, rate) for kind, target in targets.items()}
            unbiased &= {kind for kind, v in moved.items() if close(v, b["running_var"], self.near, 1.0)}
        counts = [int(t) for t in self.seen.trial.start.values() if t.numel() == 1 and not t.is_floating_point()]
        cumulative = [1 / (counts[0] + 1 + i) for i in range(2)] if counts else [2.0, 2.0]
        steady = abs(rates[0] - rates[1]) <= self.near
        if not unbiased or not (steady or all(abs(r - c) <= self.near for r, c in zip(rates, cumulative, strict=True))):
            return "its running statistics do not move as an exponential or cumulative average"
        made.options["momentum"] = round(rates[0], 6) if steady else None
        if True not in unbiased:
            made.remarks.append("its running variance was the biased one: batch norm's moves towards the unbiased one")
        if "num_batches_tracked" in self.module._buffers:
            made.roles["num_batches_tracked"] = "num_batches_tracked"
        return None

    def _frozen(self, seen: Behaviour) -> Recognised | Unknown | None:
        """Batch norm by fixed statistics; None for a scale and shift without them."""
        if self._tensor(seen.scale, 1.0) is not None:
            return None
        values, one = self.seen.values, torch.ones(self.seen.channels, dtype=torch.float64)
        for (weight, w), (var, v) in product([("", one), *values.items()], values.items()):
            square = (w / seen.scale).square() - v
            eps = float(square.median())
            fits = close(square, torch.full_like(square, eps), self.near, 1.0) and bool((w * seen.scale > 0).all())
            if var == weight or not fits or eps < -self.near:
                continue
            for (bias, b), (mean, m) in product([("", 0 * one), *values.items()], values.items()):
                names = [name for name in (weight, var, bias, mean) if name]
                if len(set(names)) == len(names) and close(b - m * seen.scale, seen.shift, self.near, 1.0):
                    roles = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
                    roles = {role: name for role, name in roles.items() if name}
                    if rest := self._rest(roles):
                        return Unknown(f"it looks like batch norm by fixed statistics, but {rest}", True)
                    options = {"eps": self._frozen_eps(eps)}
                    text = f"batch norm by fixed statistics, {', '.join(f'{r} {n}' for r, n in roles.items())}"
                    return Recognised("frozen_batch", self.dim, self.seen.channels, roles, False, options, {}, text)
        return Unknown("it is a scale and shift of channels by a function of its tensors", False)

    def _frozen_eps(self, eps: float) -> float:
        """The number that stands in the module, or that a person would write, near a difference of numbers near 1."""
        error = 1e-6 if self.seen.trial.reduced else 1e-12
        candidates = [*self.seen.numbers, 0.0, *(10.0**-k for k in range(1, 9)), float(f"{max(eps, 0):.1e}")]
        return next((c for c in candidates if abs(c - eps) <= error), max(eps, 0.0))
