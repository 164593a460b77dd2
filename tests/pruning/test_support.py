"""The support table is that of the adapters and methods, and the README's is the same."""

from pathlib import Path

import pytest

from pruning.adapters import ADAPTERS, PRUNED, TIED, adapter_for
from pruning.methods import METHODS
from pruning.support import kinds_of, tables
from tests.pruning.families import CONFIGS

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- support table -->", "<!-- end -->"


def test_every_family_space_and_method_is_in_the_table() -> None:
    text = tables()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    families = [name for name in ADAPTERS if name not in PRUNED]
    assert [row.split("`")[1] for row in rows] == [*families, *METHODS]
    assert all(f"`{name}` (" in text for name in TIED)
    assert "| `kda` | yes, but for `pca` | no | yes |" in text
    assert "value channels of `kda` (its value width is also" in text


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_s_spaces_are_those_of_real_models(name: str) -> None:
    adapter = adapter_for(CONFIGS[name])
    assert {space.kind for space in adapter.spaces(CONFIGS[name])} == kinds_of(adapter)


def test_the_readme_has_the_table() -> None:
    text = README.read_text()
    found = text.split(BEGIN, 1)[1].split(END, 1)[0].strip()
    assert found == tables(), "paste the output of python -m pruning.support"
