"""What `phalanx bench recovery` measures of a return: how long it took, what others felt of it, and what it brought.

The service says when it let the rank in, and for how long the healthy ranks stood. What that did to a stream is the gap
between its two tokens around that moment, and a gap without a return is about one step: so it is given in steps, too.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phalanx.cli.figures import cells, percentiles
from phalanx.testing.service import Service
from phalanx.testing.streams import Stream

_LET_IN = (
    r"recovered:.* ranks \[[^\]]*\b{}\b[^\]]*\] rejoined.* total (?P<total>[\d.]+) s(?: = (?P<steps>[\d.]+) steps)?"
)
_CAME_IN = r"rank {}\.{} came in (?P<total>[\d.]+) s after it was started \((?P<phases>[^)]*)\)"

_FEWEST_STEPS = 8
"""Steps in which a rate is counted; fewer say nothing."""


@dataclass(frozen=True)
class Return:
    """How a victim came back, or several that were let in together.

    after_s: from the failure until the service was seen at full strength, with all victims. pause_s: from the step
    boundary until the end of the first step with the newcomers, by the healthy ranks' own word; pause_steps: in steps
    as they took them right before, 0 where they do not say. step_s: what a
    token took before the failure, on average over a stream (they may come in bursts), of the median stream. stalls_s:
    the gap around the return, of each stream that was not over. prepared_s: what a newcomer did by itself, the slowest
    of several. before_per_s, after_per_s: pieces of all streams a second, before the failure and after the last
    return, while all ran; 0 when that was for too short a time, and where a further return followed."""

    after_s: float
    pause_s: float
    pause_steps: float
    step_s: float
    stalls_s: list[float]
    prepared_s: dict[str, float]
    before_per_s: float
    after_per_s: float

    @classmethod
    def seen(
        cls,
        service: Service,
        streams: Sequence[Stream],
        newcomers: Sequence[tuple[int, int]],
        times_s: tuple[float, float],
        line: int,
    ) -> list[Return]:
        """One for each time that some of them were let in, in that order. newcomers: rank and incarnation of each.
        times_s: when the failure happened, and when full strength was seen. line: the log's length before the failure.
        LOCAL."""
        hurt_s, back_s = times_s
        let_in: dict[float, tuple[float, float]] = {}
        prepared: dict[float, dict[str, float]] = {}
        for rank, incarnation in newcomers:
            told, at_s = service.line_at(_LET_IN.format(rank), after=line)
            let_in[at_s] = float(told["total"]), float(told["steps"] or 0)
            came_in, _ = service.line_at(_CAME_IN.format(rank, incarnation), after=line)
            words = (phase.split() for phase in came_in["phases"].split(", "))
            mine = {name: float(seconds) for name, seconds in words}
            prepared[at_s] = max(prepared.get(at_s, {}), mine, key=lambda phases: sum(phases.values()))
        step_s = _step(streams, hurt_s)
        began_s = max((stream.arrivals_s[0] for stream in streams if stream.arrivals_s), default=hurt_s)
        first_end_s = min((stream.arrivals_s[-1] for stream in streams if stream.arrivals_s), default=hurt_s)
        return [
            cls(
                after_s=back_s - hurt_s,
                pause_s=pause_s,
                pause_steps=pause_steps,
                step_s=step_s,
                stalls_s=[_gap_around(stream, at_s - pause_s / 2) for stream in _running(streams, at_s)],
                prepared_s=prepared[at_s],
                before_per_s=_rate(streams, began_s, hurt_s, step_s),
                after_per_s=_rate(streams, at_s, first_end_s, step_s) if at_s == max(let_in) else 0.0,
            )
            for at_s, (pause_s, pause_steps) in sorted(let_in.items())
        ]


def _step(streams: Sequence[Stream], until_s: float) -> float:
    """Seconds a token, of the median stream; 0 when none had two tokens by then."""
    paces = []
    for stream in streams:
        heard = bisect_right(stream.arrivals_s, until_s)
        if tokens := sum(stream.counts[1:heard]):
            paces.append((stream.arrivals_s[heard - 1] - stream.arrivals_s[0]) / tokens)
    return statistics.median(paces) if paces else 0.0


def _running(streams: Sequence[Stream], moment_s: float) -> list[Stream]:
    return [stream for stream in streams if stream.arrivals_s and stream.arrivals_s[-1] > moment_s]


def _gap_around(stream: Stream, moment_s: float) -> float:
    after = bisect_right(stream.arrivals_s, moment_s)
    if after in (0, len(stream.arrivals_s)):
        return 0.0
    return stream.arrivals_s[after] - stream.arrivals_s[after - 1]


def _rate(streams: Sequence[Stream], since_s: float, until_s: float, step_s: float) -> float:
    """Pieces a second that came in a stretch of time in which all streams ran; 0 for one that is too short."""
    if step_s <= 0 or until_s - since_s < _FEWEST_STEPS * step_s:
        return 0.0
    return sum(since_s < at <= until_s for stream in streams for at in stream.arrivals_s) / (until_s - since_s)


def figures(rounds: Sequence[Sequence[Return]]) -> dict[str, Any] | None:
    """Of the returns of each round; None when nobody came back. `gap_around_the_return_steps` are multiples of that
    round's median step before the failure, `pause_of_healthy_ranks_steps` of theirs before the return. LOCAL."""
    returned = [back for backs in rounds for back in backs]
    if not returned:
        return None
    names = list(dict.fromkeys(name for back in returned for name in back.prepared_s))
    rated = [back for back in returned if back.before_per_s and back.after_per_s]
    stepped = [back for back in returned if back.step_s]
    return {
        "kill_to_full_strength_s": percentiles([max(back.after_s for back in backs) for backs in rounds if backs]),
        "step_s": percentiles([back.step_s for back in stepped]),
        "pause_of_healthy_ranks_s": percentiles([back.pause_s for back in returned]),
        "pause_of_healthy_ranks_steps": percentiles([back.pause_steps for back in returned if back.pause_steps]),
        "gap_around_the_return_s": percentiles([gap for back in returned for gap in back.stalls_s]),
        "gap_around_the_return_steps": percentiles([gap / back.step_s for back in stepped for gap in back.stalls_s]),
        "rate_after_over_before": percentiles([back.after_per_s / back.before_per_s for back in rated]),
        "prepared_s": {name: percentiles([back.prepared_s.get(name, 0.0) for back in returned]) for name in names},
    }


def rows(kind: str, back: dict[str, Any], names: Sequence[str]) -> list[tuple[str, ...]]:
    """The table's lines for `figures`. LOCAL."""
    return [
        (f"{kind} to full strength", *cells(back["kill_to_full_strength_s"], *names)),
        *((f"  newcomer alone: {phase}", *cells(seconds, *names)) for phase, seconds in back["prepared_s"].items()),
        ("median step", *cells(back["step_s"], *names)),
        ("healthy ranks' pause for the return", *cells(back["pause_of_healthy_ranks_s"], *names)),
        ("  in their steps before it", *_plain(back["pause_of_healthy_ranks_steps"], names)),
        ("streams' gap around the return", *cells(back["gap_around_the_return_s"], *names)),
        ("  in median steps", *_plain(back["gap_around_the_return_steps"], names)),
        ("rate after the return, over before", *_plain(back["rate_after_over_before"], names)),
    ]


def _plain(values: dict[str, float], names: Sequence[str]) -> list[str]:
    return [f"{values[name]:.2f}" if name in values else "-" for name in names]
