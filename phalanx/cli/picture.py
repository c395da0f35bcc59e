"""Draws streams over time: a line for each, a tick for each token, and the failure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phalanx.errors import BadConfig
from phalanx.testing.streams import Stream


def require_matplotlib() -> None:
    """Raise BadConfig now rather than after minutes of measuring. LOCAL."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadConfig("--picture needs matplotlib: run `pip install 'phalanx[plot]'`") from None


def draw(path: Path, streams: Sequence[Stream], hurt_s: float, title: str) -> None:
    """Write a png at `path`. LOCAL.

    hurt_s: when the failure happened, on the streams' clock; it is the zero of the picture. The silence that each
    stream felt is shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.5 + 0.25 * len(streams)), layout="constrained")
    axes = figure.add_subplot()
    axes.eventplot(
        [[at - hurt_s for at in stream.arrivals_s] for stream in streams],
        lineoffsets=list(range(len(streams))),
        linelengths=0.8,
        linewidths=0.6,
        colors="tab:blue",
    )
    for row, stream in enumerate(streams):
        if silence := stream.silence(hurt_s):
            start, length = silence
            axes.broken_barh([(start - hurt_s, length)], (row - 0.4, 0.8), color="tab:red", alpha=0.2)
    axes.axvline(0.0, color="tab:red", linewidth=1.2)
    axes.set_xlabel("seconds from the failure")
    axes.set_ylabel("stream")
    axes.set_yticks(range(len(streams)), [stream.name for stream in streams])
    axes.set_title(f"{title}; a tick is a token, red is the silence that a client felt")
    figure.savefig(path, format="png", dpi=120)
