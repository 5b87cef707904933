"""A measurement without fault, and one with each fault; processes that tests start can import them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normzoo.callbacks import Column, Figure, Measurement, Run, Sample, Step


class Norms(Measurement):
    """The Euclidean norm of each gradient."""

    name = "norms"
    row = "one sampled step and parameter"
    columns: tuple[Column, ...] = (
        Column("layer", "text", "name of the parameter"),
        Column("norm", "float", "Euclidean norm of its gradient", logged=True),
    )
    figures: tuple[Figure, ...] = (Figure("Norms of gradients", "line", x="step", y="norm", lines=("layer",)),)
    needs: Any = frozenset({"gradients"})
    reduce: Any = None  # all ranks hold the same

    def measure(self, step: Step) -> Mapping[str, Tensor] | None:
        return {name: g.norm() for name, g in step.gradients().items()}

    def rows(self, sample: Sample, values: Any) -> list[dict[str, Any]]:
        return [{"layer": name, "norm": norm.item()} for name, norm in values.items()]


class Counted(Norms):
    """With the number of samples taken so far."""

    columns = (*Norms.columns, Column("samples", "int", "samples taken so far, this one included"))

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.samples_taken = 0

    def rows(self, sample: Sample, values: Any) -> list[dict[str, Any]]:
        self.samples_taken += 1
        return [{**row, "samples": self.samples_taken} for row in super().rows(sample, values)]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "samples": self.samples_taken}

    def restore(self, state_dict: Mapping[str, Any]) -> None:
        super().restore(state_dict)
        self.samples_taken = state_dict["samples"]

    def forget(self) -> None:
        super().forget()
        self.samples_taken = 0


class Branches(Measurement):
    """The variance of what each residual branch returns, of the first micro-batch of each step."""

    name = "branches"
    columns = (
        Column("layer", "text", "name of the branch"),
        Column("variance", "float", "variance of its output, mean over ranks", logged=True),
    )
    figures = (Figure("Variance of branches", "profile", x="variance", y="variance", samples=True),)
    needs = frozenset({"activations"})
    unit = "batch"
    reduce = "gather"

    def sites(self, run: Run) -> dict[Any, torch.nn.Module]:
        named = run.module.named_modules()
        return {(name, "output"): module for name, module in named if name.endswith("branch")}

    def activation(self, step: Step, site: Any, module: Any, x: Tensor) -> Tensor:
        return torch.stack([x.mean(), x.square().mean()])

    def measure(self, step: Step) -> dict[str, Tensor]:
        return {name: torch.stack(values).mean(0) for (name, _), values in step.seen.items()}

    def rows(self, sample: Sample, values: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        means = {name: gathered.mean(0).tolist() for name, gathered in values.items()}
        return [{"layer": name, "variance": square - mean**2} for name, (mean, square) in means.items()]


# record


class DrawsNoHistogram(Norms):
    """A figure of another kind than its column."""

    figures = (Figure("Norms", "histogram", x="layer", y="norm"),)


class SaysNothing(Norms):
    """A column without a meaning."""

    columns = (Column("layer", "text", "name of the parameter"), Column("norm", "float", " "))


class LeavesNoRows(Norms):
    def rows(self, sample: Sample, values: Any) -> list[dict[str, Any]]:
        return []


# schedule


class IgnoresItsSchedule(Norms):
    def samples(self, run: Run, index: int, made: int) -> bool:
        return True


# zero_perturbation


class DrawsARandomNumber(Norms):
    def measure(self, step: Step) -> Mapping[str, Tensor] | None:
        torch.rand(())
        return super().measure(step)


class RoundsAWeight(Norms):
    def measure(self, step: Step) -> Mapping[str, Tensor] | None:
        weight = next(iter(step.parameters.values())).data
        weight.copy_(weight.bfloat16())
        return super().measure(step)


# interruption


class LeavesAHook(Norms):
    """Removes its hook only if the step is made."""

    needs = frozenset({"gradients", "batch"})
    handle: Any = None

    def before_batch(self, step: Step) -> None:
        if self.handle is None:
            self.handle = step.run.module.register_forward_hook(_nothing)

    def measure(self, step: Step) -> Mapping[str, Tensor] | None:
        self.handle.remove()
        self.handle = None
        return super().measure(step)


def _nothing(*_: Any) -> None:
    """A hook."""


# no_host_read


class ReadsAValue(Norms):
    def measure(self, step: Step) -> Mapping[str, Tensor] | None:
        found = super().measure(step)
        return found if found and all(norm.item() >= 0 for norm in found.values()) else None


class ReadsAtOnce(Norms):
    def measure(self, step: Step) -> None:
        self.send(step, super().measure(step))
        self.flush(step.run)


# cost


class MeasuresEveryStep(Norms):
    def samples(self, run: Run, index: int, made: int) -> bool:
        self.largest = torch.stack([p.detach().abs().max() for p in run.module.parameters()]).max()
        return super().samples(run, index, made)


class ListensUnasked(Norms):
    """A hook in each sampled step, which it did not say that it needs."""

    needs = frozenset({"gradients", "batch"})

    handle: Any = None

    def before_batch(self, step: Step) -> None:
        if self.handle is None:
            self.handle = step.run.module.register_forward_hook(_nothing)

    def measure(self, step: Step) -> Mapping[str, Tensor] | None:
        self.handle.remove()
        self.handle = None
        return super().measure(step)


# accumulation, grad_scaler


class MeasuresEachPass(Norms):
    needs = frozenset({"backward"})

    def after_backward(self, step: Step) -> None:
        params = self.parameters(step.run, step.run.optimizers[0])
        self.send(step, {name: p.grad.norm() for name, p in params.items()})

    def measure(self, step: Step) -> None:
        return None


class KeepsTheScale(Norms):
    needs = frozenset({"backward"})

    def after_backward(self, step: Step) -> None:
        params = self.parameters(step.run, step.run.optimizers[0])
        step.memory["norms"] = {name: p.grad.norm() for name, p in params.items()}

    def measure(self, step: Step) -> Mapping[str, Tensor] | None:
        return step.memory["norms"]


class AddsUp(Norms):
    """A sum over all samples, which what is not finite spoils for good."""

    total: Tensor | float = 0.0

    def measure(self, step: Step) -> Mapping[str, Tensor] | None:
        self.total = self.total + torch.stack([*(super().measure(step) or {}).values()]).sum()
        return {"all": torch.as_tensor(self.total)}


# manual_optimization, several_optimizers


class CountsBatches(Norms):
    def samples(self, run: Run, index: int, made: int) -> bool:
        return self.schedule(run.module.calls)


class CountsAllSteps(Norms):
    def samples(self, run: Run, index: int, made: int) -> bool:
        return self.schedule(run.step)


class RefusesWithoutAName(Norms):
    def check(self, run: Run) -> None:
        if not run.automatic:
            raise ValueError("automatic optimization only")


# resume, second_fit


class ForgetsItsCount(Counted):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "samples": 0}


class RemembersItsCount(Counted):
    def forget(self) -> None:
        """Nothing is forgotten."""


class ForgetsAlways(Counted):
    def start(self, run: Run) -> None:
        self.samples_taken = 0


# two_of_a_class, copies, state_keys


class HasOneKey(Norms):
    state_key = "norms"  # type: ignore[assignment]


class HasNoLabel(Norms):
    def __init__(self, every_n_steps: Any = 1, *, dirpath: str | None = None, label: str | None = None) -> None:
        super().__init__(every_n_steps, dirpath=dirpath)


class HoldsALambda(Norms):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.function = lambda x: x


class LosesItsState(Counted):
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "samples_taken": 0}


class HashesItsLabel(Norms):
    def _key(self, alone: bool) -> str:
        return f"{type(self).__qualname__}{hash(self.label or 'none')}{bool(self.dirpath)}"


# watch, ranks, sharded_gradients, perturbation_on_ranks


class AsksTheTrainer(Norms):
    def measure(self, step: Step) -> Mapping[str, Tensor] | None:
        return {name: norm * step.run.accumulation for name, norm in (super().measure(step) or {}).items()}


class OfOneRank(Norms):
    needs = frozenset({"loss"})

    def measure(self, step: Step) -> Mapping[str, Tensor] | None:
        return None if step.loss is None else {"loss": step.loss}


class WritesOnEachRank(Norms):
    def start(self, run: Run) -> None:
        if self._record is not None and not self._record.writes:
            self._record.writes = True
            self._record.start(run.step)


class WaitsAlone(Norms):
    """A collective that one rank enters alone."""

    def measure(self, step: Step) -> Mapping[str, Tensor] | None:
        if step.run.ranks > 1 and step.run.writes:
            torch.distributed.all_reduce(torch.zeros(()))
        return super().measure(step)


class DrawsOnOneRank(Norms):
    def measure(self, step: Step) -> Mapping[str, Tensor] | None:
        if not step.run.writes:
            torch.rand(())
        return super().measure(step)


class OfOneShard(Norms):
    shards = True

    def measure(self, step: Step) -> Mapping[str, Tensor] | None:
        gradients = step.gradients().items()
        return {name: (g.to_local() if hasattr(g, "to_local") else g).norm() for name, g in gradients}


# elsewhere


@dataclass(frozen=True)
class Sized(Figure):
    """A figure that knows how large it is to be, which readers do not."""

    inches: int = 4


class DrawnHereAlone(Norms):
    figures: Sequence[Figure] = (Sized("Norms", "line", x="step", y="norm", lines=("layer",), inches=6),)  # type: ignore[assignment]
