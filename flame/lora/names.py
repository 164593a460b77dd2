"""Names of low-rank adapters: as a model with adapters has them, and as peft's files have them."""

ADAPTER = "default"
"""peft's name of the one adapter in a model."""

MAGNITUDE = "lora_magnitude_vector"
"""peft's name of the modules that hold DoRA's row lengths `m`."""

PEFT_PREFIX = "base_model.model."
"""What peft puts before every name in its adapter files."""


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


def split_peft_name(name: str, mark: str) -> tuple[str, str | None]:
    """Return what an entry of an adapter file changes in the base model, and how.

    Args:
        name: the entry's name.
        mark: what names of adapters' tensors begin with, after the module's: `lora_` for LoRA.

    Returns:
        The module's name and the part of the adapter, such as `lora_A.weight`; or the name of a
        parameter and None for an entry that replaces the whole parameter.
    """
    plain = name.removeprefix(PEFT_PREFIX)
    module, found, part = plain.partition(f".{mark}")
    if not found:
        return base_name(plain), None
    part = f"{mark}{part}.".replace(f".{ADAPTER}.", ".").removesuffix(".")
    return module, part.removesuffix(".weight") if part.startswith(MAGNITUDE) else part
