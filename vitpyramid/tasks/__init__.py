"""What is learned: one module a task, each with `make_task(config)`, the `RULES` of its config keys, and `check`."""

from types import ModuleType

from ml_collections import ConfigDict

from vitpyramid.tasks import classify, detect, segment
from vitpyramid.tasks.task import ConfigError, Task

__all__ = ["TASKS", "ConfigError", "Task", "make_task"]

TASKS: dict[str, ModuleType] = {"classify": classify, "detect": detect, "segment": segment}


def make_task(config: ConfigDict) -> Task:
    """The task `config.task` of a config that `train.config.validate` has accepted.

    Raises:
      ConfigError: the config does not fit the data.
    """
    return TASKS[config.task].make_task(config)
