"""Services that outlive a test: what dies in one comes back, so the next test finds all ranks again.

A start costs seconds of processor time, a return a fraction of one. A test that fails takes its service along, so it
spoils no other.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from phalanx.testing.service import Service, flags_of

PATIENCE_S = 90.0
"""How long ranks may take to be healthy again."""

ANY_LINE = re.compile("")


LOOK_S = 0.5
"""How often it is looked whether they are, when nothing new is in the log."""


def incarnations(service: Service, wanted: list[int] | None = None, timeout_s: float = PATIENCE_S) -> list[int]:
    """Of all ranks, as soon as all are healthy. wanted: and are these, for an ordered death may still be to come."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = service.lines
        ranks = service.status()["ranks"]
        found = [rank["incarnation"] for rank in ranks]
        assert not wanted or all(map(int.__le__, found, wanted)), f"more died than {wanted}: {ranks}"
        if {rank["state"] for rank in ranks} == {"healthy"} and (not wanted or found == wanted):
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"not healthy as {wanted or 'any'} within {timeout_s} s: {ranks}")
        with suppress(TimeoutError):
            service.wait_for_line(ANY_LINE, LOOK_S, after=seen)


class Standing:
    """One service, started when it is first wanted: four ranks, chaos enabled, and whoever dies is started again."""

    def __init__(self, model: Path, **options: Any) -> None:
        usual = {"ep_size": 4, "enable_chaos": True, "max_num_batched_tokens": 64, "max_restarts": 10_000}
        self._command = (str(model), *flags_of(**{**usual, **options}))
        self._service: Service | None = None

    @contextmanager
    def losing(self, *ranks: int, also: Sequence[int] = ()) -> Iterator[Service]:
        """The service with all ranks healthy, of which exactly `ranks` are to die, each once, and to come back.

        also: the same for what only shows meanwhile, a list that grows; a rank is in it as often as it died."""
        if self._service is None:
            self._service = Service(*self._command).__enter__()
        service = self._service
        try:
            before = incarnations(service)
            yield service
            incarnations(service, [n + (*ranks, *also).count(rank) for rank, n in enumerate(before)])
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Stop the service, if there is one; the next who wants it gets another."""
        if self._service is not None:
            self._service.stop()
            self._service = None
