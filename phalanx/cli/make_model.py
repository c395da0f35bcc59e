"""`phalanx make-model OUT`: a small random checkpoint, one that talks, or a well-known shape for benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from phalanx.errors import BadConfig
from phalanx.testing.service import ends_on_sigterm

SHARD_BYTES = 4 * 10**9
"""A weight file is put together in memory, and should have no more."""


@click.command("make-model", context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--arch", type=click.Choice(["qwen3-moe", "mixtral"]), help="Write a random model of this architecture.")
@click.option("--shape", metavar="NAME", help="For benchmarks: the sizes of qwen3-30b-a3b, qwen3-235b-a22b, ...")
@click.option("--config-only", is_flag=True, help="No weights: for `phalanx serve OUT --load-format dummy`.")
@click.option("--upcycle", is_flag=True, help="Write a model that talks: SmolLM2-135M-Instruct, its MLPs as experts.")
@click.option("--layers", type=int, help="Layers.  [default: 4]")
@click.option("--experts", type=int, help="Experts a layer.  [default: 8]")
@click.option("--top-k", type=int, help="Experts a token.  [default: 2]")
@click.option("--hidden", type=int, help="Model width.  [default: 64]")
@click.option("--expert-width", type=int, help="Inner width of an expert.  [default: 64]")
@click.option("--heads", type=int, help="Attention heads.  [default: 4]")
@click.option("--kv-heads", type=int, help="Key and value heads.  [default: 2]")
@click.option("--head-dim", type=int, help="Width of a head.  [default: 16]")
@click.option("--vocab", type=int, help="Tokens; 259 are used.  [default: 259]")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float32", "fp8"]), help="How weights are stored.  [default: bfloat16]"
)
@click.option("--shards", type=int, help="Weight files, at most; more where one has over 4 GB.  [default: 2]")
@click.option(
    "--spelling", type=click.Choice(["hub", "transformers5"]), help="Field names of config.json.  [default: hub]"
)
@click.option(
    "--noise", type=float, help="With --upcycle: noise on each expert, in standard deviations.  [default: 0.03]"
)
@click.option("--gguf", type=click.Path(path_type=Path), help="With --upcycle: the source, instead of the package's.")
@click.option("--seed", type=int, default=0, help="The same seed gives the same weights.")
@click.option("--force", is_flag=True, help="Replace a model that is there already.")
def make_model(
    out: Path, arch: str | None, shape: str | None, upcycle: bool, seed: int, force: bool, config_only: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Write a small model at OUT, in the Hugging Face layout.

    \b
    phalanx make-model tiny --arch qwen3-moe --layers 4 --experts 16
    phalanx make-model smol --upcycle
    phalanx make-model big --shape qwen3-30b-a3b --layers 12 --config-only
    """
    given = {name: value for name, value in options.items() if value is not None}
    if [bool(arch), bool(shape), upcycle].count(True) != 1:
        raise BadConfig(
            "choose one of --arch qwen3-moe|mixtral (random weights), --shape NAME (the sizes of a large model) and "
            "--upcycle (a model that talks)"
        )
    if upcycle and config_only:
        raise BadConfig("--config-only does not go with --upcycle: random weights have no text to talk with")
    allowed = {"experts", "top_k", "noise", "gguf"} if upcycle else set(options) - {"noise", "gguf"}
    if extra := sorted(set(given) - allowed):
        flags = ", ".join("--" + name.replace("_", "-") for name in extra)
        raise BadConfig(f"{flags} does not go with {'--upcycle' if upcycle else '--shape' if shape else '--arch'}")
    try:
        with ends_on_sigterm():  # a part of a model would stay behind
            if upcycle:
                _write_upcycled(out, seed, force, given)
            else:
                _write_random(out, arch, shape, seed, force, config_only, given)
    except OSError as error:
        raise BadConfig(f"{out} cannot be written: {error}") from None


def _write_random(
    out: Path, arch: str | None, name: str | None, seed: int, force: bool, config_only: bool, given: dict[str, Any]
) -> None:
    from phalanx.testing.shapes import SHAPES
    from phalanx.testing.tiny import Shape, model_bytes, write_random

    if name is not None and name not in SHAPES:
        raise BadConfig(f"--shape {name} is not known: choose one of {', '.join(SHAPES)}")
    storage = {key: given.pop(key) for key in ("dtype", "shards", "spelling") if key in given}
    shape = replace(SHAPES[name] if name else Shape(arch), **given)  # type: ignore[arg-type]
    if not config_only:
        shape.check()
        size = model_bytes(shape, storage.get("dtype", "bfloat16"))
        storage.setdefault("shards", max(2, -(-size // SHARD_BYTES)))
    write_random(out, shape, weights=not config_only, seed=seed, force=force, **storage)
    click.echo(f"wrote {out}" + (" (no weights: serve it with --load-format dummy)" if config_only else ""))


def _write_upcycled(out: Path, seed: int, force: bool, given: dict[str, Any]) -> None:
    from phalanx.testing.upcycle import Recipe, is_made, make_upcycled

    gguf = given.pop("gguf", None)
    recipe = Recipe(**given, seed=seed)
    if is_made(out, recipe) and not force:
        click.echo(f"{out} is there already")
        return
    with progress_bar("writing experts") as (started, advance):
        make_upcycled(out, recipe, gguf=gguf, force=force, started=started, progress=advance)
    click.echo(f"wrote {out}")


@contextmanager
def progress_bar(what: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar over bytes, on standard error: yields (set the total, advance)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(what, total=None)

    def started(total_bytes: int) -> None:
        bar.update(task, total=total_bytes)
        bar.start()  # not before: what goes wrong earlier needs no bar

    try:
        yield started, lambda size: bar.update(task, advance=size)
    finally:
        bar.stop()
