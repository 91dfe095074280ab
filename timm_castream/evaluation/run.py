"""One start of an evaluation: what is finished, what is left for this process, and what it keeps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .distributed import Processes
from .resume import Journal
from .values import ImageValues

_logger = logging.getLogger(__name__)


class Run:
    """Keeps finished batches, in a folder if there is one, and resumes from them. A context manager.

    Args:
        settings: Everything that changes values, plain data: a folder with other settings is refused.
        batches: The indices of the images of every batch.
        folder: Folder of the results, or None.
        keep_curves: Whether finished values should have curves.
        processes: The processes that share the work.

    Attributes:
        temperatures_path: File of the fitted temperatures, or None.

    Raises:
        ValueError: If the folder holds another evaluation, a file in it is damaged, or another run writes to it.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        batches: Sequence[Sequence[int]],
        folder: str | Path | None = None,
        keep_curves: bool = False,
        processes: Processes | None = None,
    ) -> None:
        self._settings = settings
        self._batches = batches
        self._keep_curves = keep_curves
        self._processes = processes or Processes.current()
        self._journal = None if folder is None else Journal(Path(folder), self._processes.rank)
        self._parts: list[ImageValues] = []
        self._finished: set[int] = set()
        self._unreadable: dict[str, str] = {}

    @property
    def temperatures_path(self) -> Path | None:
        """File of the fitted temperatures of the folder, or None."""
        return None if self._journal is None else self._journal.temperatures_path

    def __enter__(self) -> Run:
        journal, processes = self._journal, self._processes
        if journal is None:
            return self
        try:
            processes.on_main(journal.lock)
            finished = processes.on_main(lambda: journal.resume(self._settings))
        except BaseException:
            journal.close()
            raise
        self._finished = set(finished.images['image'].tolist())
        if self._finished:
            has_curves = any(array.ndim > 1 and array.dtype != bool for array in finished.pairs.values())
            if self._keep_curves and not has_curves:
                _logger.warning('The curves of the finished images were not kept: evaluate in another folder for them.')
            if processes.rank == 0:
                self._parts.append(finished)
                _logger.info(
                    '%d images were finished before, their values are in %s.', len(self._finished), journal.folder
                )
        return self

    def __exit__(self, *error: object) -> None:
        if self._journal is not None:
            self._journal.close()

    def remaining(self) -> list[list[int]]:
        """The batches that are left for this process, without their finished images."""
        left = [[index for index in batch if index not in self._finished] for batch in self._batches]
        return [batch for batch in left if batch][self._processes.rank :: self._processes.count]

    def keep(self, values: ImageValues) -> None:
        """Keeps the values of a batch.

        Raises:
            ValueError: If its curves have another number of steps, which the size of an image decides.
        """
        before = self._parts[0].pairs if self._parts else {}
        if any(name in before and before[name].shape[1:] != array.shape[1:] for name, array in values.pairs.items()):
            raise ValueError(
                'The images have different sizes, so their curves have different numbers of steps, and keep_curves '
                'averages them: leave it out, or resize the images in the transform of the data set.'
            )
        if self._journal is not None:
            self._journal.append(values)
        self._parts.append(values)

    def lose(self, unreadable: Mapping[str, str]) -> None:
        """Notes images that could not be read, {name: reason}."""
        self._unreadable |= unreadable

    def values(self) -> ImageValues:
        """The values of all images of all processes, in the order of the images."""
        own = ImageValues.concatenate(self._parts)
        return ImageValues.concatenate(self._processes.all_gather(own))

    def unreadable(self) -> dict[str, str]:
        """The unreadable images of all processes, {name: reason}, by name."""
        return dict(sorted(pair for part in self._processes.all_gather(self._unreadable) for pair in part.items()))
