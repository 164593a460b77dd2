"""Log lines on the terminal: this project's and torchtitan's, from rank 0."""

import logging
import os
import sys
import warnings

_OURS = ("flame", "pruning", "kernels", "launch")
_TITAN = ("step:", "Model ")
"""How the lines of torchtitan begin that a user asks for; it logs to the root logger."""

_EXPECTED = ("torch.distributed is already initialized",)
"""Warnings about what this project does on purpose."""


class _Worthwhile(logging.Filter):
    """Warnings of everyone; information of this project, and torchtitan's progress."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if record.levelno >= logging.WARNING:
            return not message.startswith(_EXPECTED)
        if record.name == "root":
            return message.startswith(_TITAN)
        return record.name.partition(".")[0] in _OURS


def configure() -> None:
    """Send log lines to stdout: all of rank 0, warnings of other ranks. Stages call it."""
    # The losses are taken from the model's last hidden states, which nothing changes in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    root = logging.getLogger()
    root.handlers.clear()
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_Worthwhile())
    root.addHandler(handler)
    root.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
