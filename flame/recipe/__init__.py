"""Recipes: what training takes from a TOML file and a command line, without torchtitan.

`sections` and `running` declare the keys, `keys` checks values, `words` reads a command line,
`tables` and `text` read and write files. `flame.config` makes torchtitan's job configuration of
one, whose import takes seconds.
"""

from flame.recipe.tables import data_config, read_tables, sequence_length
from flame.recipe.text import recipe_text
from flame.recipe.words import option_name, recipe_path

__all__ = [
    "data_config",
    "option_name",
    "read_tables",
    "recipe_path",
    "recipe_text",
    "sequence_length",
]
