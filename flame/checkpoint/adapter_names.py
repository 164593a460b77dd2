"""Names of low-rank adapters: as a model with adapters has them, and as peft's files have them."""

import re

ADAPTER = "default"
"""peft's name of the one adapter in a model."""

MAGNITUDE = "lora_magnitude_vector"
"""peft's name of the modules that hold DoRA's row lengths `m`."""

PEFT_PREFIX = "base_model.model."
"""What peft puts before every name in its adapter files."""

_FILE_NAME = re.compile(
    rf"{re.escape(PEFT_PREFIX)}(?P<module>.+)\."
    rf"(?:lora_(?P<part>[AB])(?:\.[^.]+)?\.weight|{MAGNITUDE}(?:\.[^.]+)?(?:\.weight)?)"
)


def is_adapter(name: str) -> bool:
    """Whether a parameter is part of an adapter: `A`, `B` or `m`."""
    return ".lora_" in name


def base_name(name: str) -> str:
    """The name that parameter `name` of an adapted model has in the model without adapters."""
    return name.replace(".base_layer.", ".")


def peft_name(name: str) -> str:
    """The name of parameter `name` of an adapted model in peft's adapter files."""
    if is_adapter(name):
        name = name.removesuffix(".weight") if f".{MAGNITUDE}." in name else name
        name = f"{name}.".replace(f".{ADAPTER}.", ".").removesuffix(".")
    return PEFT_PREFIX + name


def split_peft_name(name: str) -> tuple[str, str | None]:
    """Return the base model's parameter that an entry of an adapter file changes, and how.

    The second item is `A`, `B` or `m`; None for an entry that replaces the whole parameter.
    """
    match = _FILE_NAME.fullmatch(name)
    if match is None:
        return base_name(name.removeprefix(PEFT_PREFIX)), None
    return f"{match['module']}.weight", match["part"] or "m"
