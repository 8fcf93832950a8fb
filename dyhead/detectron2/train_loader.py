"""Images to train on, in the order of Detectron2's samplers, from any iteration on as if it had begun at the first."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from dyhead.data import DataError
from dyhead.detectron2.datasets import NamingMapper, check_trainable
from dyhead.runs.batches import grouped
from dyhead.runs.interruption import leave_to_main_process
from dyhead.runs.seeds import global_augmentation_rng


class TrainLoader:
    """Batches of ``DATASETS.TRAIN`` for one process: lists of what :class:`NamingMapper` makes of records.

    ``DATALOADER.SAMPLER_TRAIN`` orders the images, as in Detectron2's own loader. How one is augmented depends on
    ``seed``, the process's rank and the image's position in its stream only, not on the worker process or on what was
    loaded before.

    Args:
        cfg: the configuration; ``SOLVER.IMS_PER_BATCH`` counts the images of all processes together.

    Attributes:
        seed: of augmentation, not negative; set it, and ``start``, before the loader is iterated over.
        start: iterations that are done.

    Raises:
        DataError: there is nothing to train on; on use, also from a worker process: an image is broken.
    """

    def __init__(self, cfg: CfgNode) -> None:
        check_trainable(cfg)
        mapper = NamingMapper(cfg, is_train=True)
        try:
            parts = build_detection_train_loader.from_config(cfg, mapper=mapper)
        except AssertionError as error:  # what Detectron2 says of datasets that are not ours
            raise DataError(f"DATASETS.TRAIN {', '.join(cfg.DATASETS.TRAIN)}: {error}") from error
        records = parts["dataset"]
        # Of images without sizes, which Detectron2 would learn by reading them, nothing is known before.
        self._is_wide = [record.get("width", 0) > record.get("height", 0) for record in records]
        self._records = DatasetFromList(records, copy=False)
        self._mapper, self._sampler = mapper, parts["sampler"]
        self._batch_size = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        self._group = cfg.DATALOADER.ASPECT_RATIO_GROUPING
        self._workers = cfg.DATALOADER.NUM_WORKERS
        self.seed, self.start = 0, 0

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        loader = DataLoader(
            _Augmented(self._records, self._mapper, self.seed, comm.get_rank()),
            batch_sampler=_Batches(self),
            num_workers=self._workers,
            collate_fn=_collate,
            worker_init_fn=leave_to_main_process,
            generator=torch.Generator(),  # or its seed for the workers would be drawn from the model's numbers
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch

    def positions(self) -> Iterator[list[tuple[int, int]]]:
        """Batches, from ``start`` on, of positions in this process's stream and the records that stand there."""
        pairs = enumerate(self._sampler)
        batches = grouped(pairs, self._batch_size, lambda pair: self._group and self._is_wide[pair[1]])
        return islice(batches, self.start, None)


class _Batches(Sampler[list[tuple[int, int]]]):
    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._loader.positions()


class _Augmented(Dataset):
    """Records by their position in the stream and their index, mapped; a broken image is its error.

    An exception would come out of a worker process with the whole traceback for a message.
    """

    def __init__(self, records: DatasetFromList, mapper: NamingMapper, seed: int, rank: int) -> None:
        self._records, self._mapper, self._seed, self._rank = records, mapper, seed, rank

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any] | DataError:
        position, index = place
        with global_augmentation_rng(self._seed, self._rank, position):
            try:
                return self._mapper(self._records[index])
            except DataError as error:
                return error


def _collate(samples: list[dict[str, Any] | DataError]) -> list[dict[str, Any]] | DataError:
    return next((sample for sample in samples if isinstance(sample, DataError)), samples)
