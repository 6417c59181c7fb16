"""The data loader of `initialize(training_data=)`: micro-batches, each rank its own part, a new order each epoch.

In: a dataset. Out: batches of `train_micro_batch_size_per_gpu` samples on each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset


class EpochLoader:
    """Iterates over a dataset; every `iter()` is the next epoch, in an order of its own.

    Args:
        dataset: Map-style: split and shuffled over ranks. Iterable: each rank iterates its own copy, which must
            itself yield different samples on different ranks.
        batch_size: Samples in a batch.
        rank: Of this process.
        world: Number of ranks.
        seed: Of the order.
        drop_last: Leave out the last, smaller batch.
        collate_fn: Makes a batch of samples; None is torch's own.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        rank: int,
        world: int,
        seed: int,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self.epoch = 0
        self._sampler: DistributedSampler[Any] | None = None
        if not isinstance(dataset, IterableDataset):
            self._sampler = DistributedSampler(
                dataset, world, rank, shuffle=True, seed=seed, drop_last=drop_last
            )
        self.loader: DataLoader[Any] = DataLoader(
            dataset, batch_size, sampler=self._sampler, drop_last=drop_last, collate_fn=collate_fn
        )

    @property
    def dataset(self) -> Dataset[Any]:
        """What is iterated over."""
        return self.loader.dataset

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self._sampler is not None:
            self._sampler.set_epoch(self.epoch)
        self.epoch += 1
        return iter(self.loader)
