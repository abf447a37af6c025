"""Work on many samples where the device's memory does not hold as many at once as was thought."""

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from utils.command import UserError, out_of_memory

log = logging.getLogger("dataelixir")
T = TypeVar("T")


class Halving:
    """Calls a function on parts of an index, half as large from where the memory did not suffice.

    A sample's result must not depend on the samples beside it. `key` sets the size of a part, and
    is named in messages.
    """

    def __init__(self, key: str):
        self.key = key
        self.size: int | None = None  # the most samples at once, once the memory has ended

    def __call__(self, work: Callable[[Tensor], T], index: Tensor) -> Iterator[T]:
        """Results of `work` on parts of `index` (B,); UserError where one sample is too many."""
        while len(index):
            part = index[: self.size]
            result = self._tried(work, part)
            if result is None:
                self.size = len(part) // 2
                words = "%s: %d samples at once need more memory than there is; going on with %d"
                log.warning(words, self.key, len(part), self.size)
                continue
            yield result
            index = index[len(part) :]

    def _tried(self, work: Callable[[Tensor], T], part: Tensor) -> T | None:
        try:
            return work(part)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(part) == 1:
                words = f"{self.key}: there is not enough memory for a single sample"
                raise UserError(f"{words}; free some, or give another --device") from None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # only here the failed attempt's tensors are gone
        return None
