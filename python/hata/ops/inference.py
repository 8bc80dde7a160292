"""No operator has a gradient, and none loses one without a word."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library("hata", "IMPL")  # what it registers lasts as long as it does


def inference_only(wrapper: Callable[P, R]) -> Callable[P, R]:
    """Makes an operator's wrapper refuse tensors that require a gradient while one is recorded.

    The operator of that name, called without its wrapper, builds no graph: its outputs require no
    gradient.
    """
    _library.impl(wrapper.__name__, torch.library.fallthrough_kernel, "Autograd")

    @functools.wraps(wrapper)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_grad_enabled():
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.requires_grad:
                    given = inspect.signature(wrapper).bind(*args, **kwargs).arguments
                    name = next(name for name, other in given.items() if other is value)
                    raise ValueError(
                        f"hata.{wrapper.__name__}: {name} must not require a gradient (hata is "
                        "inference only: call it under torch.no_grad()), got requires_grad=True"
                    )
        return wrapper(*args, **kwargs)

    return checked
