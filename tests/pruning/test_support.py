"""docs/support.md is what the adapters and methods say."""

from pathlib import Path

import pytest

from pruning.adapters import ADAPTERS, PRUNED, TIED, adapter_for
from pruning.methods import METHODS
from pruning.support import kinds_of, page
from tests.pruning.families import CONFIGS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"


def test_every_family_space_and_method_is_in_the_table() -> None:
    text = page()
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


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run python -m pruning.support > docs/support.md"
