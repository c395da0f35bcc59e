"""The launcher's notices for kernels whose device cannot map the notice board itself."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import torch
from torch import Tensor

from phalanx.comm.notices import NoticeBoard


class NoticeRelay:
    """Copies the launcher's notices into pinned words, where the device cannot map the board itself."""

    def __init__(self, board: NoticeBoard, dead: Tensor) -> None:
        self._board, self._dead = board, dead
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="phalanx-notices", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        seen = -1
        with contextlib.suppress(ValueError):  # the board was closed first: there is nothing more to copy
            while not self._stop.wait(0.001):
                if self._board.version != seen:
                    seen = self._board.version
                    words = np.array(self._board.dead_words)
                    self._dead[: len(words)] = torch.from_numpy(words)

    def close(self) -> None:
        """No more is copied when this returns. LOCAL."""
        self._stop.set()
        with contextlib.suppress(RuntimeError):
            self._thread.join()
