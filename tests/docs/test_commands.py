"""docs/commands.md is what the stages' options make."""

from pathlib import Path

from flame.options import entries
from flame.recipe.keys import all_keys
from launch import recipe_page
from launch.cli import COMMANDS
from launch.commands_page import page

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"


def test_the_page_is_that_of_the_options() -> None:
    assert PAGE.read_text() == page(), "python -m launch.commands_page > docs/commands.md"


def test_every_option_of_every_command_is_on_the_page() -> None:
    from importlib import import_module

    sections = {part.split("\n")[0]: part for part in page().split("\n## slimstate ")[1:]}
    assert list(sections) == list(COMMANDS)
    for name, command in COMMANDS.items():
        for entry in entries(import_module(command.module).STAGE.options):
            assert f"| `{entry.flag}" in sections[name]
            assert entry.declared.help.replace("|", "\\|") in sections[name]


def test_the_page_of_recipe_keys_is_up_to_date() -> None:
    written = (PAGE.parent / "recipe.md").read_text()
    assert written == recipe_page.page(), "python -m launch.recipe_page > docs/recipe.md"
    for name in all_keys():
        assert written.count(f"| `{name.partition('.')[2]}` |") >= 1
