"""The support table is that of the adapters and methods, and the README's is the same."""

from pathlib import Path

import pytest

from pruning.adapters import ADAPTERS, PRUNED, TIED, adapter_for
from pruning.methods import METHODS
from pruning.support import kinds_of, table
from tests.pruning.families import CONFIGS

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- support table -->", "<!-- end -->"


def test_every_family_space_and_method_is_in_the_table() -> None:
    text = table()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == 3 * len(set(ADAPTERS) - set(PRUNED))
    assert all(f"`{name}`" in text for name in [*METHODS, *TIED])
    value_of_kda = next(row for row in rows if row.startswith("| `kda` | value"))
    assert "none: its value width is also" in value_of_kda


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_s_spaces_are_those_of_real_models(name: str) -> None:
    adapter = adapter_for(CONFIGS[name])
    assert {space.kind for space in adapter.spaces(CONFIGS[name])} == kinds_of(adapter)


def test_the_readme_has_the_table() -> None:
    text = README.read_text()
    if BEGIN not in text:
        pytest.skip("the README has no support table yet")
    found = text.split(BEGIN, 1)[1].split(END, 1)[0].strip()
    assert found == table(), "paste the output of python -m pruning.support"
