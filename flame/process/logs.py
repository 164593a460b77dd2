"""Log lines on the terminal: this project's and torchtitan's, from rank 0."""

import logging
import os
import re
import sys
import warnings

_OURS = ("flame", "pruning", "kernels", "launch")
_TITAN = ("step:", "validate step:", "Model ")
"""How torchtitan's lines worth showing begin; it logs to the root logger."""

_COLOUR = re.compile(r"(\033\[[\d;]*m)+")
"""What torchtitan puts in front of them, where `metrics.disable_color_printing` is false."""

_EXPECTED = ("torch.distributed is already initialized",)
"""How warnings begin that are about what this project does on purpose."""


class _Worthwhile(logging.Filter):
    """Passes all warnings but expected ones, this project's information, torchtitan's progress."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if record.levelno >= logging.WARNING:
            return not message.startswith(_EXPECTED)
        if record.name == "root":
            colour = _COLOUR.match(message)
            return message.startswith(_TITAN, colour.end() if colour else 0)
        return record.name.partition(".")[0] in _OURS


def configure() -> None:
    """Send rank 0's log lines, and other ranks' warnings, to stdout. Only stages call it."""
    # The losses are taken from the model's last hidden states, which nothing changes in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    root = logging.getLogger()
    root.handlers.clear()
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_Worthwhile())
    root.addHandler(handler)
    root.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
