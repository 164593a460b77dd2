"""Ways to damage a step folder, and a pickle that does harm when it is loaded."""

import json
import os
from pathlib import Path
from typing import Any

from flame.storage.checksums import CHECKSUMS, hash_bytes


class Bomb:
    """Makes the folder `target` when it is unpickled as a stock reader would."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def rewrite(step: Path, name: str, data: bytes) -> None:
    """Replace a file and its recorded hash, as an attacker or a confused tool would."""
    (step / name).write_bytes(data)
    content = json.loads((step / CHECKSUMS).read_text())
    content["files"][name] = hash_bytes(data)
    (step / CHECKSUMS).write_text(json.dumps(content))


def flip_byte(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
