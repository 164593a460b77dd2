"""What a tokenizer's files must look like, and how much they may make of a text."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from flame.errors import UserError
from flame.storage.json_file import read_object

TOKENIZER_JSON = "tokenizer.json"

LARGEST = 128 * 2**20
"""Most bytes of a file; a vocabulary of 262,000 tokens with its merges has 33 MB."""

MOST_GROWTH = 64
"""Most characters that normalizers may make of one."""

LONGEST_PREPENDED = 64
"""Most characters that a normalizer may put before a text."""

MOST_STEPS = 64
"""Most normalizers in a row."""


class _Added(TypedDict):
    id: int
    content: str
    special: NotRequired[bool]


class _Tokenizer(TypedDict):
    model: dict[str, Any]
    added_tokens: NotRequired[list[_Added] | None]
    normalizer: NotRequired[dict[str, Any] | None]
    pre_tokenizer: NotRequired[dict[str, Any] | None]
    post_processor: NotRequired[dict[str, Any] | None]
    decoder: NotRequired[dict[str, Any] | None]


_Token = str | dict[str, Any] | None


class _Config(TypedDict):
    tokenizer_class: NotRequired[str | None]
    model_max_length: NotRequired[float | None]
    added_tokens_decoder: NotRequired[dict[str, dict[str, Any]] | None]
    bos_token: NotRequired[_Token]
    eos_token: NotRequired[_Token]
    unk_token: NotRequired[_Token]
    pad_token: NotRequired[_Token]
    sep_token: NotRequired[_Token]
    cls_token: NotRequired[_Token]
    mask_token: NotRequired[_Token]


_SHAPES: dict[str, Any] = {
    TOKENIZER_JSON: _Tokenizer,
    "tokenizer_config.json": _Config,
    "special_tokens_map.json": _Config,
    "added_tokens.json": None,
    "vocab.json": None,
}


def check_files(folder: Path) -> None:
    """Check the JSON files of a tokenizer in a folder, as far as they are there.

    Raises:
        UserError: one is not JSON, has a value of another type than it must, or normalizers that
            make much of little.
    """
    for name, shape in _SHAPES.items():
        if (folder / name).exists():
            content = read_object(folder / name, shape=shape, largest=LARGEST)
            if name == TOKENIZER_JSON:
                _check_growth(folder / name, content)


def _check_growth(path: Path, content: dict[str, Any]) -> None:
    try:
        growth = 1.0
        for step in _steps(content.get("normalizer")):
            growth *= _growth(step)
            if growth > MOST_GROWTH:
                raise ValueError(f"its normalizers make more than {MOST_GROWTH} characters of one")
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _steps(normalizer: Any) -> list[dict[str, Any]]:
    """Return the normalizers that run one after another, those in sequences included."""
    waiting, steps = [normalizer], []
    while waiting:
        step = waiting.pop(0)
        if step is None:
            continue
        if not isinstance(step, dict):
            raise ValueError("a normalizer is no table")
        if step.get("type") == "Sequence":
            inner = step.get("normalizers")
            waiting = [*(inner if isinstance(inner, list) else []), *waiting]
        steps.append(step)
        if len(steps) + len(waiting) > MOST_STEPS:
            raise ValueError(f"it has more than {MOST_STEPS} normalizers")
    return steps


def _growth(step: dict[str, Any]) -> float:
    """Return the most characters that a normalizer makes of one."""
    if step.get("type") == "Prepend" and len(str(step.get("prepend"))) > LONGEST_PREPENDED:
        raise ValueError(f"it puts more than {LONGEST_PREPENDED} characters before each text")
    if step.get("type") != "Replace":
        return 1.0
    pattern, content = step.get("pattern"), str(step.get("content"))
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(literal, str) and literal:
        return max(1.0, len(content) / len(literal))
    # A regular expression may match between any two characters.
    return 1.0 + len(content)
