"""Whether the Hugging Face hub can be reached, known within seconds.

The hub's clients retry for 20 to 50 s before they say that there is no network.
"""

import socket
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies

TIMEOUT = 5.0
"""Seconds to wait for a name server and a connection."""


def hub_problem() -> str | None:
    """Why the hub cannot be used now, in words for an error line, or `None` if it can."""
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    endpoint = constants.ENDPOINT
    return None if reachable(endpoint) else f"{endpoint} cannot be reached from here"


def reachable(url: str, timeout: float = TIMEOUT) -> bool:
    """Whether the host of `url`, or the proxy that leads to it, accepts a connection."""
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


def _connects(host: str, port: int, timeout: float) -> bool:
    try:
        socket.create_connection((host, port), timeout).close()
    except OSError:
        return False
    return True
