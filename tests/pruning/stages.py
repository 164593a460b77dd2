"""Stages as tests run them: by words, in this process."""

from typing import Any

from pruning import prune


def stage(of: Any, *arguments: Any) -> None:
    """Run a stage as one of the processes of its job."""
    from flame.process.distributed import world_size

    options = of.STAGE.parse([str(word) for word in arguments])
    of.check(options, world_size())
    of.run(options)


def pruned(*arguments: Any) -> None:
    stage(prune, *arguments)
