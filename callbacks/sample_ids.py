"""Which samples are in a batch, as the sampler of its loader knows it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler

_MOST_AHEAD = 10_000  # batches that workers may have been asked for before they are trained on


class RecordingBatchSampler(BatchSampler):
    """A ``BatchSampler`` that remembers the ids of the samples in the batches that are still to come.

    :class:`normzoo.callbacks.Recorder` finds it in the Trainer's loader, and keeps the ids of each batch. Batches come
    in the order in which the sampler is asked for them, whatever the number of workers, unless a ``DataLoader`` is told
    ``in_order=False``.

    Args:
        sampler: of ids; see :class:`torch.utils.data.BatchSampler`.
        batch_size: the number of samples in a batch.
        drop_last: leave out a last batch that would be smaller.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, RandomSampler, TensorDataset
        >>> data = TensorDataset(torch.arange(5.0))
        >>> sampler = RecordingBatchSampler(RandomSampler(data), batch_size=2, drop_last=False)
        >>> [len(x) == len(sampler.next_ids()) for (x,) in DataLoader(data, batch_sampler=sampler)]
        [True, True, True]
    """

    def __init__(self, sampler: Any, batch_size: int, drop_last: bool) -> None:
        super().__init__(sampler, batch_size, drop_last)
        self._ahead: deque[list[Any]] = deque(maxlen=_MOST_AHEAD)

    def __iter__(self) -> Iterator[list[Any]]:
        self._ahead.clear()
        for ids in super().__iter__():
            self._ahead.append(list(ids))
            yield ids

    def next_ids(self) -> list[Any] | None:
        """The ids of the samples in the next batch, which the sampler then forgets; None after the last batch."""
        return self._ahead.popleft() if self._ahead else None
