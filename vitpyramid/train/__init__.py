"""Training: `vitpyramid.train(config, workdir)` from Python, and the loop, the state and the checkpoints behind it."""

import os
import sys
import types
from collections.abc import Callable


class _Training(types.ModuleType):
    """This package, which can be called."""

    def __call__(
        self,
        config,
        workdir: str | os.PathLike,
        callback: Callable[[dict], None] | None = None,
        allow_config_change: bool = False,
        verbose: bool = True,
    ):
        """Trains what a config describes, from the last complete checkpoint in `workdir` if there is one.

        The same program as `main.py`. In a notebook, interrupting the cell saves and ends the run; the same call goes
        on from there.

        Args:
          config: an `ml_collections.ConfigDict` with the keys of `configs/base.py`, such as `vitpyramid.load_config`
            gives, or what that takes: "quickstart.py:rest", the path of a file of one's own.
          workdir: folder or gs://... of the run.
          callback: called with each line of progress and each evaluation as it is made: `{"step": int, "train/loss":
            float, ...}` or `{"step": int, "eval/top1": float, ...}`. What it raises ends the run.
          allow_config_change: go on although the config differs from the checkpoint's.
          verbose: print the lines of progress, unless logging shows them already.

        Returns:
          A `vitpyramid.train.report.Summary`: `step`, `total_steps`, `finished`, `metrics` of the last evaluation,
          `best_step` and `best`, `history` (all records that a callback gets), `totals` (what was counted over all
          steps), `examples_per_second`, `compile_seconds`, `workdir`.

        Raises:
          ConfigError: the config cannot be run, does not fit the data, or contradicts the checkpoint; another run holds
            `workdir`.
          OSError: no checkpoint is intact, or a file cannot be read or written.
          NonFiniteError: the loss or gradient stopped being finite; what was saved before is untouched.
        """
        # Here: whoever only makes networks needs no data, optimizers and checkpoints.
        import jax
        from ml_collections import ConfigDict

        from vitpyramid.progress import printed
        from vitpyramid.tasks import make_task
        from vitpyramid.train import loop
        from vitpyramid.train.config import load_config, reference, validate
        from vitpyramid.train.workdir import open_workdir

        config = config.copy_and_resolve_references() if isinstance(config, ConfigDict) else load_config(config)
        validate(config, reference(), jax.device_count())
        with printed(verbose):
            path = open_workdir(workdir)
            task = make_task(config)
            path.mkdir(parents=True, exist_ok=True)
            return loop.train(task, path, allow_config_change, callback)


# The name is that of the package and that of the function.
sys.modules[__name__].__class__ = _Training
