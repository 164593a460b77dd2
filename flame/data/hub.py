"""The Hugging Face hub: whether it can be reached, and models from it.

The hub's own clients retry for 20 to 50 s before they say that there is no network; the check here
takes seconds.
"""

import re
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from flame.errors import UserError, first_line

TIMEOUT = 5.0
"""Seconds to wait for a name server and a connection."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

MODEL_FILES = (
    *("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken"),
    *("LICENSE*", "NOTICE*", "README.md"),
)
"""Patterns of the files that are fetched of a model: weights, and what lies beside them."""


def hub_problem() -> str | None:
    """Return why the hub cannot be used now, in words for an error line, or None if it can."""
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    endpoint = constants.ENDPOINT
    return None if reachable(endpoint) else f"{endpoint} cannot be reached from here"


def reachable(url: str, timeout: float = TIMEOUT) -> bool:
    """Return whether the host of `url`, or the proxy for it, is connected within `timeout` s."""
    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if proxy:
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    answers: list[bool] = []
    # A name server that does not answer ignores socket time-outs, so a thread waits for it.
    worker = threading.Thread(
        target=lambda: answers.append(_connects(parts.hostname or "", port, timeout)), daemon=True
    )
    worker.start()
    worker.join(timeout)
    return bool(answers and answers[0])


def download(name: str, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """Return the local folder of a hub model, brought up to date if the hub can be reached.

    Only files that match one of the glob `patterns` are fetched. Raises `UserError` if the model is
    neither on the hub nor in the local cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    problem = hub_problem()
    try:
        return Path(
            snapshot_download(name, allow_patterns=list(patterns), local_files_only=bool(problem))
        )
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(
            f"no model {name}: no such folder, and not to be had from the hub "
            f"({problem or first_line(error)}); give a local folder"
        ) from error


def _connects(host: str, port: int, timeout: float) -> bool:
    try:
        socket.create_connection((host, port), timeout).close()
    except OSError:
        return False
    return True


def may_be_hub_name(reference: str) -> bool:
    """Return whether a word has the form of a hub name, and is no path on this machine."""
    parent = Path(reference).parent
    return bool(_HUB_NAME.fullmatch(reference)) and (str(parent) == "." or not parent.is_dir())
