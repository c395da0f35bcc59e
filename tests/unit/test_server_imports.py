"""The server starts fast and stays small: it must not bring torch or transformers."""

from __future__ import annotations

import subprocess
import sys


def test_the_server_and_the_observers_bring_no_torch_and_no_transformers() -> None:
    script = (
        "import sys, phalanx.server.__main__, phalanx.observe.metrics, phalanx.observe.log; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'safetensors'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
