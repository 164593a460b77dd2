"""Make the page docs/recipe.md: every key of a recipe, and how to train with one.

`python -m launch.recipe_page > docs/recipe.md` writes it anew.
"""

import dataclasses
import json
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flame.recipe.keys import declared_by, keys_of, sections
from flame.recipe.running import MOST

INTRODUCTION = """# Recipes

Made from the keys that the code declares: write it anew with
`python -m launch.recipe_page > docs/recipe.md`.

A recipe is a TOML file with the sections below, in torchtitan's words. `slimstate recipes` lists
those that come with slimstate, `--show NAME` prints one, `--copy NAME` copies it and its config.
`slimstate train --config RECIPE.toml --training.steps 200` overrides a key: lists are one word with
commas (or several words), truth values are `--data.streaming` or `--data.no-streaming`, and `none`
unsets a key that may be unset.

A recipe's inputs are looked for beside the recipe and then in the working directory; the run folder
(`job.dump_folder`) is made in the working directory. The run folder's own `recipe.toml` names its
config and tokenizer relative to itself and the rest in full, so the folder may be moved.

Keys of torchtitan that are not listed have no effect here: changing one is an error. No module that
a recipe names is ever imported.

## A model of your own

`slimstate recipes --copy demo_pretrain` copies a small recipe and its `demo_config.json`, which
names a family (`model_type`) and its sizes in the words of that family's config class in fla or
transformers; what it leaves out has the class's default. Change `job.dump_folder`, `data.dataset`,
`data.tokenizer` (next section) and, if you like, the sizes; `data.heldout` is the text that `eval`
measures on.

## A tokenizer

```
slimstate tokenizer tokenizers/mine --data text/ --size 32768
slimstate train --config recipe.toml --data.dataset text/ --data.tokenizer tokenizers/mine
```

trains a byte-level BPE on the text (a hub name, local files, or `python-stdlib`). The model's
`vocab_size` must be at least its size.

## Going on

The same command goes on with a run that was stopped. A run is bound to its model, the model that it
started from, its text, its tokenizer, and to {bound}: another one is refused by name, and contents
are compared, so inputs may have moved. Of the text, the number of documents and a sample of 64 are
compared. Other keys may change, such as `training.steps` or `optimizer.lr`: `run.json` in the run
folder records each change with its step. A finished run says so and stays as it is; `--init RUN`
with another `job.dump_folder` starts a new run from its weights.

## Curves, validation, and evaluation of every step

`tensorboard --logdir runs` shows the curves of all runs below `runs/`: loss and its parts, gradient
norm, learning rate, tokens per second, memory.

```
[data]
heldout = "heldout.jsonl"

[validation]
enable = true
freq = 500        # and the first and the last step
steps = 10        # batches of training.global_batch_size sequences
```

measures the loss on held-out text while training, on the terminal and in TensorBoard as
`validation_metrics/loss` and `validation_metrics/bits_per_byte`. The rows are the same each time,
and the figure is the same on every number of processes, to rounding. To measure steps afterwards,
keep them (`checkpoint.keep_latest_k = 0`) and name them:

```
slimstate eval runs/mine/checkpoint/step-* --perplexity heldout.jsonl
```
"""

HEADER = "| key | type | default | what |\n|---|---|---|---|"


def page() -> str:
    """Return the whole page, in Markdown."""
    from flame.run_folder.bound import BOUND

    bound = ", ".join(f"`{key}`" for key in BOUND)
    parts = [INTRODUCTION.replace("{bound}", bound), "## Keys"]
    return "\n\n".join([part.rstrip() for part in parts] + [*map(_section, sections())]) + "\n"


def _section(name: str) -> str:
    of = sections()[name]
    rows = [_row(of, key) for key in keys_of(of)]
    said = of.__doc__ if "ce_weight" in (of.__doc__ or "") else ""
    return "\n\n".join(filter(None, [f"### [{name}]", said, "\n".join([HEADER, *rows])]))


def _row(of: Any, key: str) -> str:
    declared, kind = declared_by(of, key), get_type_hints(of)[key]
    if declared.most == MOST:
        declared = dataclasses.replace(declared, most=None)
    default = getattr(of(), key)
    written = "" if default is None else f"`{json.dumps(default)}`"
    cells = [f"`{key}`", f"{_kind(kind)}{declared.bounds()}", written, declared.help]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f"`{word}`" for word in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {get_args(kind)[0].__name__}"
    if dataclasses.is_dataclass(kind) or not get_args(kind):
        return kind.__name__
    return " or none".join([get_args(kind)[0].__name__, ""])


if __name__ == "__main__":
    print(page(), end="")
