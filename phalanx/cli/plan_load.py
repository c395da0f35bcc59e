"""Expert loads for `phalanx plan`: read from a file, or made up in a way that real ones look."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from phalanx.errors import BadConfig

Floats = npt.NDArray[np.float64]
Kind = Literal["zipf", "lognormal", "drifting", "uniform"]
KINDS: tuple[str, ...] = get_args(Kind)


def synthetic(kind: str, layers: int, experts: int, windows: int = 2, seed: int = 0) -> Floats:
    """Loads [W, L, E] of `windows` windows in a row. LOCAL, deterministic.

    uniform: all experts alike. zipf: the i-th hottest expert of a layer gets 1/i. lognormal: sigma 1. Both stay what
    they are but for the noise of counting (5 %). drifting: log-normal, and each window an expert keeps 90 % of its
    log-load and gets new noise, so that the ranking changes within ten windows or so.
    """
    rng = np.random.default_rng(seed)
    shape = (layers, experts)
    if kind == "drifting":
        log = rng.standard_normal(shape)
        out = []
        for _ in range(windows):
            out.append(np.exp(log))
            log = 0.9 * log + np.sqrt(1 - 0.9**2) * rng.standard_normal(shape)
        return np.stack(out)
    if kind == "uniform":
        return np.ones((windows, *shape))
    if kind == "zipf":
        base = rng.permuted(np.tile(1.0 / np.arange(1, experts + 1), (layers, 1)), axis=1)
    else:
        assert kind == "lognormal", kind
        base = rng.lognormal(0, 1, shape)
    return np.asarray(base * rng.lognormal(0, 0.05, (windows, *shape)), np.float64)


def read_load(path: Path) -> Floats:
    """Loads [W, L, E] from an npz (array `load`, or the only one), csv (a row a layer) or json file (nested lists,
    or an object with `load`). A file with [L, E] is one window. Raises BadConfig with one clear line."""
    readers = {".npz": _npz, ".csv": _csv, ".json": _json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise BadConfig(f"--load {path}: a file must end in {', '.join(readers)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = np.asarray(reader(path))
    except BadConfig:
        raise
    except FileNotFoundError:
        raise BadConfig(f"--load {path}: there is no such file") from None
    except Exception as error:  # a broken archive, number or nesting: each reader has its own kinds of errors
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise BadConfig(f"--load {path}: cannot be read as a table of numbers: {said}") from None
    if table.dtype.kind not in "iuf":
        raise BadConfig(f"--load {path}: is a table of {table.dtype.name}, not of real numbers")
    with np.errstate(over="ignore"):  # of wider floats
        load = table.astype(np.float64)
    if load.ndim == 2:
        load = load[None]
    if load.ndim != 3 or not load.size:
        raise BadConfig(f"--load {path}: must be [layers, experts] or [windows, layers, experts], it is {load.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        sums = load.sum(axis=2)
    if not np.isfinite(sums).all() or load.min() < 0:
        raise BadConfig(f"--load {path}: loads must be finite, in sum too, and not negative")
    return load


def _npz(path: Path) -> npt.ArrayLike:
    arrays = np.load(path, allow_pickle=False)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise BadConfig(f"--load {path}: is a single array, not an npz archive: write it with numpy.savez")
    with arrays:
        names = arrays.files
        if "load" in names:
            name = "load"
        elif len(names) == 1:
            name = names[0]
        else:
            raise BadConfig(f"--load {path}: has no array `load`, only {', '.join(names) or 'nothing'}")
        return np.asarray(arrays[name])


def _csv(path: Path) -> npt.ArrayLike:
    return np.loadtxt(path, delimiter=",", ndmin=2)


def _json(path: Path) -> npt.ArrayLike:
    data = json.loads(path.read_text())
    if isinstance(data, dict):
        if "load" not in data:
            raise BadConfig(f"--load {path}: the object has no `load`")
        data = data["load"]
    return np.asarray(data)
