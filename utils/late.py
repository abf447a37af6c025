"""torch, imported when something of it is first used.

Its import takes seconds, and neither `--help` nor a word about a wrong key needs it. What a command line is made of (settings,
and the code beside them) therefore has its torch from here; files that define networks import torch itself, and are imported late.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class Late:
    """Stands for a module; whoever asks for one of its attributes gets the module's.

    Args:
        name: as `import` has it.
    """

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # asked of any object, by what inspects them
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)


def mode(name: str) -> Callable[[Function], Function]:
    """A decorator like `torch.NAME()`, one of torch's context managers, that imports torch when the function is called."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            with getattr(torch, name)():
                return function(*args, **kwargs)

        return called

    return decorate


if TYPE_CHECKING:
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
else:
    torch, nn, F = Late("torch"), Late("torch.nn"), Late("torch.nn.functional")
    Tensor = Any  # annotations alone name it
inference_mode, no_grad, enable_grad = mode("inference_mode"), mode("no_grad"), mode("enable_grad")
