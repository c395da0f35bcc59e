"""Work whose outcome is the same for all: one of those who need it does it, and the others read what came out."""

from __future__ import annotations

from collections.abc import Callable

from phalanx.elastic.store import Store


def once(store: Store, key: str, work: Callable[[], str], *, me: str, patience_s: float) -> str:
    """The outcome of `work`, a text that is not empty; the first that is written down under `key` counts for all.

    Whoever comes first does the work. The others wait for at most `patience_s`, then do it themselves: the first may
    be dead. Later ones, such as newcomers, find it done. me: who asks, unlike everybody else. LOCAL."""
    if found := store.get(key):
        return found.decode()
    if store.compare_set(f"{key}/taken", "", me) != me and (found := store.wait(key, patience_s)):
        return found.decode()
    return store.compare_set(key, "", work())
