"""The promise about plain PyTorch loops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.optim import Optimizer

from normzoo.callbacks._run.isolation import own_random_streams
from normzoo.callbacks._run.loop import Watch
from normzoo.callbacks._run.loop import watch as start_watch
from normzoo.records.reading import read_records
from normzoo.testing._compare import BrokenError
from normzoo.testing._promises import promise
from normzoo.testing.measurements._fits import EPOCHS, Subject
from normzoo.testing.measurements._rows import same_rows
from normzoo.testing.measurements._task import BASE, Task, loader


@promise()
def watch(subject: Subject) -> None:
    """In a plain loop under normzoo.watch the rows are those of a Trainer, or it is refused by one clear line."""
    folder, entered = subject.new_folder(), False
    try:
        with own_random_streams():
            torch.manual_seed(3)
            task = Task(subject.net, BASE)
            optimizer = task.configure_optimizers()
            with start_watch(task, optimizer, subject.make(), dirpath=folder) as watching:
                entered = True
                _train(task, optimizer, watching)
    except ValueError as refusal:
        if entered:
            raise
        subject.refused(str(refusal))
    record = read_records(folder).get(subject.name)
    if record is None:
        raise BrokenError(f"in a plain loop: there is no record {subject.name!r}")
    same_rows("in a plain loop", record, subject.base[2])


def _train(task: Task, optimizer: Optimizer, watching: Watch) -> None:
    """What a Trainer does of the task."""
    batches = [batch for _ in range(EPOCHS) for batch in loader(BASE)]
    for first in range(0, len(batches), BASE.accumulation):
        optimizer.zero_grad()
        for x, y in batches[first : first + BASE.accumulation]:
            loss = F.cross_entropy(task(x), y)
            watching.batch((x, y))
            watching.loss(loss)
            task.on_before_backward(loss)
            (loss / BASE.accumulation).backward()
        optimizer.step()
