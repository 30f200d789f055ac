"""What the public functions check of their arguments before an operator sees them.

An error names function, argument, what it must be and what it got. Values in a tensor are read
where the tensor is: on the CPU they raise ValueError, elsewhere, and under torch.compile, they stop
the program by an assertion, because to read them would mean to wait for the device.
"""

import numbers
from typing import Any

import torch
from torch import Tensor


def same_device(op: str, name: str, first: Tensor, **others: Tensor | None) -> None:
    # Here and not only in the kernels: with one tensor on another device, PyTorch may not get as
    # far as a kernel.
    for other, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{op}: {other} must be on {first.device} like {name}, got {tensor.device}"
            )


def refuse_grad(op: str, **constants: Any) -> None:
    """Refuse tensors for which there is no gradient, where it would be lost in silence."""
    for name, value in constants.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{op}: {name} must not require grad, it is a constant; detach it")


def number(op: str, name: str, value: Any) -> float:
    """The argument as a number: of Python or NumPy, or of a CPU tensor without dimensions.

    A tensor on a device is refused, since its value would have to be waited for, and one that
    requires grad, since it would get none.
    """
    refuse_grad(op, **{name: value})
    if isinstance(value, Tensor) and value.dim() == 0 and value.device.type == "cpu":
        value = value.item()
    if not isinstance(value, (Tensor, bool)):
        if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
            return value  # type: ignore[return-value]  # torch.compile may know it by a symbol
        if isinstance(value, numbers.Real):
            return float(value)
    got = f"a tensor {list(value.shape)} on {value.device}" if isinstance(value, Tensor) else value
    raise TypeError(f"{op}: {name} must be a number, got {got!r}")


def integer(op: str, name: str, value: Any) -> int:
    """The argument as a whole number; see `number`."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return value if isinstance(value, int) else int(value)
    found = number(op, name, value)
    if not isinstance(found, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be a whole number, got {value!r}")
    return found


def check_values(op: str, name: str, values: Tensor, allowed: Tensor, must: str) -> None:
    """Values [..] of an argument, where `allowed` [..] is False, are refused."""
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(allowed.all(), f"{op}: {name} must be {must}")
    elif not allowed.all():
        position = int((~allowed).flatten().nonzero()[0])
        wrong = values.flatten()[position].item()
        raise ValueError(f"{op}: {name} must be {must}, got {wrong} at position {position}")
