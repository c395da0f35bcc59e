"""Real failures of a CUDA device, made on purpose: what `testing.faults` calls for its DEVICE_KINDS.

    faults.on_device = DeviceFaults(device)

A kernel that fails does so while the host is elsewhere: `__call__` launches it on the stream on which the rank
computes, and returns. The error comes up where the host next waits for the device, as it would in a service.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
# Triton's language is not typed: its functions are compiled, never called by Python.

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["astray"])
def _store_kernel(word, astray):
    """Store to a word, or, when `astray` is not 0, into the first page, where no device has memory. LOCAL."""
    address = tl.where(astray != 0, 16, word.to(tl.int64))
    tl.store(address.to(tl.pointer_type(tl.int32)), 1)


@triton.jit
def _spin_kernel(word):
    """Spin until a word is not 0. LOCAL."""
    seen = tl.load(word, volatile=True)
    while seen == 0:
        seen = tl.load(word, volatile=True)


class DeviceFaults:
    """Makes one device fail in this process's context. Other processes' contexts on it are not touched."""

    def __init__(self, device: torch.device) -> None:
        """Compiles what is needed, so that a failure comes when it is asked for. Waits for the device."""
        self._device = device
        self._word = torch.ones(1, dtype=torch.int32, device=device)
        self._few = torch.zeros(4, dtype=torch.int64, device=device)
        self._beyond = self._few[:1] + 9
        _store_kernel[(1,)](self._word, 0)
        _spin_kernel[(1,)](self._word)
        torch.cuda.synchronize(device)

    def __call__(self, kind: str) -> None:
        """Fail in one of `testing.faults.DEVICE_KINDS`. LOCAL.

        out-of-memory raises torch.OutOfMemoryError here; the others are launched, and waited for by nobody."""
        match kind:
            case "illegal-access":
                _store_kernel[(1,)](self._word, 1)
            case "device-assert":
                self._few.index_select(0, self._beyond)
            case "out-of-memory":
                size = 2 * torch.cuda.get_device_properties(self._device).total_memory
                torch.empty(size, dtype=torch.uint8, device=self._device)
            case "hung-kernel":
                self._word.zero_()
                _spin_kernel[(1,)](self._word)
            case _:
                raise ValueError(f"{kind!r} is no failure of a device")
