"""Two clients of the field against a real service, offline: lm-eval (echo with logprobs) and guidellm (load).

    make compat                                    # installs both beside the project's environment, then runs this
    python scripts/compat.py BIN [--model MODEL]   # BIN: the directory with their commands

They are large and pin much, so they are no dependency of the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from phalanx.testing.service import Service, ends_on_sigterm
from phalanx.testing.tiny import make_tiny

TASKS = Path(__file__).parent.parent / "tests" / "api" / "lm_eval"


@click.command()
@click.argument("bin_dir", type=click.Path(exists=True, path_type=Path))
@click.option("--model", default="", help="A model directory; by default a small random one is made.")
def main(bin_dir: Path, model: str) -> None:
    """Run lm-eval and guidellm from BIN_DIR against a service of MODEL."""
    path = Path(model or "build/compat-model").resolve()
    if not (path / "config.json").exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make_tiny(path, "mixtral")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with ends_on_sigterm(), Service(str(path), "--ep-size", "2") as service:
        settings = (
            f"model={path.name},base_url={service.url}/v1/completions,tokenizer={path},"
            "num_concurrent=4,tokenized_requests=True"
        )
        evaluate = ["run", "--model", "local-completions", "--model_args", settings]
        evaluate += ["--include_path", ".", "--tasks", "phalanx_choices"]
        load = ["run", "--backend", f"kind=openai_http,target={service.url}", "--profile", "kind=concurrent,streams=4"]
        load += ["--constraint", "kind=max_requests,count=8", "--tokenizer", f"kind=huggingface_auto,model={path}"]
        load += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16", "--disable-progress"]
        load += ["--output", "kind=console"]
        for command in ([bin_dir.resolve() / "lm_eval", *evaluate], [bin_dir.resolve() / "guidellm", *load]):
            code = subprocess.run([str(part) for part in command], cwd=TASKS, env=offline).returncode
            if code != 0:
                sys.exit(f"{Path(command[0]).name} ended with exit code {code}")
    click.echo("both clients finished without an error")


if __name__ == "__main__":
    main()
