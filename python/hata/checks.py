"""Argument checks; every message reads "hata.<function>: <argument> must <rule>, got <value>"."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check(holds: bool, function: str, argument: str, rule: str, got: object) -> None:
    """Raises ValueError unless ``holds``."""
    if not holds:
        raise ValueError(f"hata.{function}: {argument} must {rule}, got {got}")


def check_type(holds: bool, function: str, argument: str, rule: str, got: object) -> None:
    """Raises TypeError, naming the type of ``got``, unless ``holds``."""
    if not holds:
        raise TypeError(f"hata.{function}: {argument} must {rule}, got {type(got).__name__}")


def check_int(
    function: str, argument: str, value: object, low: int, high: int | None = None
) -> None:
    """Raises unless ``value`` is an int (no bool) in ``low..high``; without ``high``, any above."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    check_type(is_int, function, argument, "be an int", value)
    if isinstance(value, int):
        rule = f"be at least {low}" if high is None else f"be in {low}..{high}"
        check(low <= value and (high is None or value <= high), function, argument, rule, value)


def check_tensor(
    function: str,
    argument: str,
    value: object,
    dims: Sequence[tuple[str, int | None]],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raises unless ``value`` is a tensor of this shape, dtype and device.

    Args:
        function: The public function that checks.
        argument: The name of its argument.
        value: What was given.
        dims: Name and size of each dimension; a size of None accepts any.
        dtype: The dtype that it must have.
        device: The device that it must lie on.
    """
    check_type(isinstance(value, Tensor), function, argument, "be a tensor", value)
    assert isinstance(value, Tensor)  # what check_type has made sure of, for the type checker
    shape = tuple(value.shape)
    fits = len(shape) == len(dims) and all(
        size is None or size == got for (_, size), got in zip(dims, shape, strict=True)
    )
    names = ", ".join(name if size is None else f"{name}={size}" for name, size in dims)
    check(fits, function, argument, f"have shape [{names}]", list(shape))
    check(value.dtype == dtype, function, argument, f"be {dtype}", value.dtype)
    check(value.device == device, function, argument, f"be on {device}", value.device)
