"""A Triton kernel that only reads: what the device's memory gives, to compare kernels with that compute, too."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_kernel(words, out, count, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Add up `count` int32 words, AT_ONCE blocks asked for together; out: [programs, BLOCK]. Grid: any."""
    pid = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(pid * BLOCK * AT_ONCE, count, tl.num_programs(0) * BLOCK * AT_ONCE):
        for block in tl.static_range(AT_ONCE):
            at = start + block * BLOCK + i
            total += tl.load(words + at, mask=at < count, other=0)
    tl.store(out + pid * BLOCK + i, total)
