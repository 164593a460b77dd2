"""Private names of other libraries: all are listed, and all are there."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import flame.process.titan_cpu  # noqa: F401
from flame.private import (
    fla_names,
    peft_names,
    torch_names,
    torchtitan_names,
    transformers_names,
)
from flame.private.names import PrivateName, missing

ROOT = Path(__file__).parents[3]
LIBRARIES = [torch_names, torchtitan_names, transformers_names, fla_names, peft_names]
NAMES = [name for library in LIBRARIES for name in library.NAMES]
PUBLIC = {"_exit"}
"""Documented in spite of their underscore."""


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.__name__)
def test_the_installed_release_has_every_name(library: SimpleNamespace) -> None:
    assert missing(library.NAMES) == []


def test_a_name_that_disappeared_is_found() -> None:
    gone = ["torch:no_such_name", "torch.no_such_module:x", "torch.nn:Module()._no_such_buffers"]
    there = ["torch.nn:Module()._buffers"]
    names = [PrivateName(path, "", "") for path in gone + there]
    assert missing(names) == gone


def test_the_code_uses_no_private_name_that_is_not_listed() -> None:
    files = [file for package in ("flame", "kernels", "pruning", "launch")
             for file in sorted((ROOT / package).rglob("*.py"))]  # fmt: skip
    trees = {file: ast.parse(file.read_text()) for file in files}
    own = {name for tree in trees.values() for name in defined(tree)}
    listed = {part for name in NAMES for part in name.path.replace(":", ".").split(".")}
    known = own | listed | {*torch_names.BY_INSTANCE, *transformers_names.MARKS} | PUBLIC
    wrong = [
        f"{file.relative_to(ROOT)}:{line} uses {name}"
        for file, tree in trees.items()
        for line, name in used(tree)
        if is_private(name) and name not in {part.removesuffix("()") for part in known}
    ]
    assert wrong == []


def defined(tree: ast.AST) -> Iterator[str]:
    """Names that a module of ours defines: functions, classes, variables, attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr


def used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Attributes that a module reads or sets, and names and modules that it imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            for name in [*str(node.module).split("."), *(alias.name for alias in node.names)]:
                yield node.lineno, name


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_groups_of_parameters_are_found_as_each_release_keeps_them() -> None:
    """torch 2.11 has one group or none in a module's state; 2.12 and later have a list."""
    groups = torch_names.parameter_groups
    assert groups(SimpleNamespace(_fsdp_param_group=None)) == []
    assert groups(SimpleNamespace(_fsdp_param_group=1)) == [1]
    assert groups(SimpleNamespace(_fsdp_param_groups=[1, 2])) == [1, 2]


def test_our_dora_layer_takes_what_peft_hands_over() -> None:
    from peft.tuners.lora.dora import DoraLinearLayer

    from flame.recovery.dora import Magnitude

    theirs = set(inspect.signature(DoraLinearLayer.forward).parameters)
    assert theirs <= set(inspect.signature(Magnitude.forward).parameters)


def test_the_card_of_a_model_says_which_releases_generate_rightly() -> None:
    import tomllib

    from flame.hugging_face.model_card import GENERATING

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"transformers{GENERATING}" in project["dependencies"]
