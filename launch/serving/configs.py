"""Configs of models whose weights need not be there."""

from pathlib import Path
from typing import Any

from flame.checkpoint.reference import CONFIG_FILE, read_config, resolve
from flame.data.hub import download


def config_of(reference: str) -> dict[str, Any]:
    """Return the config.json of a model.

    Args:
        reference: the file itself under any name that ends in `.json`, a folder that holds one, a
            run or step folder, or a hub name, of which only that file is fetched.

    Raises:
        UserError: there is none, or it is no config.
    """
    path = Path(reference)
    if path.suffix == ".json":
        return read_config(path)
    if (path / CONFIG_FILE).is_file():
        return read_config(path / CONFIG_FILE)
    if path.exists() or reference.count("/") > 1 or reference.startswith((".", "/", "~")):
        return resolve(reference).config
    return read_config(download(reference, [CONFIG_FILE]) / CONFIG_FILE)
