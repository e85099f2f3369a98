"""How the operators' kernels are launched."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def overlap(tensor: torch.Tensor) -> dict[str, Any]:
    """Launch options of a kernel that may start while the one before it ends (programmatic dependent launch).

    Such a kernel takes ``OVERLAP`` and calls ``gdc_wait`` before it reads anything that a kernel wrote, and before it
    writes. It may call ``gdc_launch_dependents`` first of all: the next kernel's own wait lasts until this one has
    ended, which ends after its wait, so that whatever ran earlier has ended too.

    Args:
        tensor: any argument of the kernel; needs Hopper or newer.
    """
    if tensor.is_cuda and _can_overlap(tensor.device):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


def power_of_two(number: int) -> int:
    """The least power of two that is not below a positive number; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()
