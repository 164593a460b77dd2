"""Configs of models whose weights need not be there."""

from pathlib import Path
from typing import Any

from flame.checkpoint.fingerprint import canonical_config
from flame.checkpoint.reference import CONFIG_FILE, read_config, resolve
from flame.data.hub import download
from flame.hugging_face.outer_model import text_config
from flame.storage.json_file import read_object
from pruning.planning.plan_file import PLAN_FILE, read_plan


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


def served_configs(reference: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the config of a model or of a plan's result, and that of the model before pruning.

    Args:
        reference: a plan's file, or what `config_of` takes; a folder may hold its plan.

    Raises:
        UserError: there is none, or it is neither.
    """
    path = Path(reference)
    if path.suffix == ".json" and "spaces" in read_object(path):
        plan = read_plan(path)
        return plan.config_after, plan.config_before
    config, beside = config_of(reference), path / PLAN_FILE
    if beside.is_file():
        plan = read_plan(beside)
        text = text_config(config) or config
        if canonical_config(plan.config_after) == canonical_config(text):
            return config, plan.config_before
    return config, None
