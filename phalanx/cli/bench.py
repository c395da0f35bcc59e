"""`phalanx bench`: measure a service, its speed and what its clients feel of a failure."""

from __future__ import annotations

import click

from phalanx.cli.bench_recovery import recovery
from phalanx.cli.bench_serve import serve


@click.group()
def bench() -> None:
    """Measure a service: its speed, and what its clients feel when a rank fails."""


bench.add_command(serve)
bench.add_command(recovery)
