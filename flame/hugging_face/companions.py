"""What lies beside a model's weights and belongs to it: tokenizer, templates, generation config.

They survive training, pruning and conversion as they are, byte for byte.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from flame.hugging_face.config_file import CONFIG_FILE
from flame.storage.json_file import read_object_if_any

README_FILE = "README.md"
SOURCE_README = "README.source.md"
"""The name that the README of the model keeps from which a folder was made."""

TEMPLATE_FOLDER = "additional_chat_templates"
GENERATION_CONFIG = "generation_config.json"

LARGEST = 128 << 20
"""Most bytes of a companion; the largest tokenizers have a fifth of it."""

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx",
    ".npz", ".npy", ".tflite", ".distcp", ".index.json",
)  # fmt: skip
"""Ends of the names of files with weights in any form, which are converted or left behind."""

_TOKENIZER_NAMES = (
    "tokenizer", "vocab", "merges", "spiece", "sentencepiece", "special_tokens_map", "added_tokens",
    "chat_template", TEMPLATE_FOLDER,
)  # fmt: skip
"""Beginnings of the names of a tokenizer's files."""

_TOKENIZER_PROOF = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""Files of which a folder with a tokenizer has one."""
TOKENIZER_FILES = (
    *_TOKENIZER_PROOF,
    "tokenizer_config.json",
    *("special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)

_OURS = frozenset({
    CONFIG_FILE, README_FILE, "recipe.toml", "plan.json", "base.json", "teacher.json",
    "adapter_config.json", "checksums.json", "meta.json", "dataloader.json",
})  # fmt: skip
"""Files with a meaning of their own, which those who write a folder write themselves."""

_RECORDS = (".log", ".out", ".err", ".jsonl", ".csv", ".svg", ".png", ".html", ".toml", ".tmp")
"""Ends of the names of records of work, which would tell another model's story."""


def companions(folder: Path) -> Iterator[Path]:
    """Yield the companions of the model in `folder`: its files and folders of chat templates.

    Weights, hidden files, records of training and this program's result files are none.
    """
    for path in sorted(folder.iterdir()):
        if path.name == TEMPLATE_FOLDER and path.is_dir():
            yield path
        elif path.is_file() and not _is_other(path) and path.stat().st_size <= LARGEST:
            yield path


def copy_companions(folder: Path, into: Path, with_tokenizer: bool = True) -> list[str]:
    """Copy the companions of the model in `folder` into the folder `into`; return their names.

    What `into` has already stays. A README of the model's publisher gets the name `SOURCE_README`.
    """
    copied = []
    for path in companions(folder):
        if not (into / path.name).exists() and (with_tokenizer or not is_tokenizer_part(path)):
            _copy(path, into / path.name)
            copied.append(path.name)
    return copied + _copy_readme(folder, into)


def tokenizer_folder(folder: Path) -> Path | None:
    """Return `folder` if it holds a tokenizer, else None."""
    return folder if any((folder / name).is_file() for name in _TOKENIZER_PROOF) else None


def copy_tokenizer(folder: Path, into: Path) -> None:
    """Copy the files of the tokenizer in `folder` into the folder `into`, in place of others."""
    for path in companions(folder):
        if is_tokenizer_part(path):
            _copy(path, into / path.name)


def is_tokenizer_part(path: Path) -> bool:
    """Return whether a companion belongs to the tokenizer, by its name."""
    return path.name.startswith(_TOKENIZER_NAMES)


def _copy(path: Path, target: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, target, copy_function=shutil.copyfile, dirs_exist_ok=True)
    else:
        shutil.copyfile(path, target)


def _copy_readme(folder: Path, into: Path) -> list[str]:
    from flame.hugging_face.model_card import is_model_card

    readme = folder / README_FILE
    if not readme.is_file() or is_model_card(readme) or readme.stat().st_size > LARGEST:
        return []
    if (into / SOURCE_README).exists():
        return []
    shutil.copyfile(readme, into / SOURCE_README)
    return [SOURCE_README]


def _is_other(path: Path) -> bool:
    name = path.name
    if name in _OURS or name.startswith((".", "events.")) or name.endswith((*_WEIGHTS, *_RECORDS)):
        return True
    if path.suffix != ".json":
        return False
    content = read_object_if_any(path)
    return "kind" in content and "versions" in content and "command" in content
