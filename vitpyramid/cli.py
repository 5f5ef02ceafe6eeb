"""Trains or evaluates what a config describes, or says what that would take.

    vitpyramid --config=quickstart.py --workdir=runs/quickstart
    vitpyramid --config=pvt.py:large --mode=preflight --topology=v5e:16x16

`main.py` is the same. --config takes a path, or one of the configs that come with the package.

Exit codes: 0 done; 1 the config or the command line cannot be run, or a preflight's step does not fit; 70 the loss
stopped being finite; 74 a file cannot be read or written; 75 stopped by SIGTERM or Ctrl-C after saving: the same
command goes on from there; 76 another process of the run has ended.
"""

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TextIO

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

import vitpyramid
from vitpyramid import configs
from vitpyramid.tasks import ConfigError, make_task
from vitpyramid.tools import chips, preflight, report
from vitpyramid.tools.config_args import read_flags
from vitpyramid.train import loop
from vitpyramid.train.config import reference, validate
from vitpyramid.train.report import NonFiniteError, format_summary
from vitpyramid.train.workdir import open_workdir

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "Default: quickstart.py. --config.KEY=VALUE changes a key.")
flags.DEFINE_string("workdir", "", "Folder or gs://... of the run, resumed if there is one. Default: runs/CONFIG.")
flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "preflight"],
    "Train, evaluate the newest checkpoint in --workdir, or compile and say what memory and time a run would take.",
)
flags.DEFINE_string(
    "topology", "", "With preflight: a TPU that need not be there, as v5e:16x16. Default: this machine."
)
flags.DEFINE_integer("num_slices", 1, "With preflight: slices of that topology.", lower_bound=1)
flags.DEFINE_integer("search_compiles", 2, "With preflight: compilations to find the largest batch.", lower_bound=0)
flags.DEFINE_bool("json", False, "With preflight: JSON on stdout, progress on stderr.")
flags.DEFINE_bool(
    "report", False, "With eval: classes, their confusions and the worst mistakes, to report/ in --workdir."
)
flags.DEFINE_bool("allow_config_change", False, "Resume although the config differs from the checkpoint's.")
flags.DEFINE_bool("distributed", False, "One of several processes; JAX finds out on Cloud TPU, Slurm and MPI.")
flags.DEFINE_string("coordinator_address", None, "host:port of process 0, where JAX cannot find out by itself.")
flags.DEFINE_integer("num_processes", None, "Processes in all; goes with --coordinator_address.")
flags.DEFINE_integer("process_id", None, "This process, from 0; goes with --coordinator_address.")

EXIT_CONFIG, EXIT_NON_FINITE, EXIT_IO, EXIT_STOPPED, EXIT_PEER = 1, 70, 74, 75, 76
_JOINING = 300  # seconds until all processes are there: a cluster starts them minutes apart
_PATIENCE = 60  # seconds without a sign of another process
log = logging.getLogger("vitpyramid")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags start with --")
    if FLAGS.mode == "preflight":
        return _preflight()
    if FLAGS.topology:
        sys.exit(f"--topology={FLAGS.topology} goes with --mode=preflight, not with --mode={FLAGS.mode}")
    if FLAGS.report and FLAGS.mode != "eval":
        sys.exit(f"--report goes with --mode=eval, not with --mode={FLAGS.mode}")
    try:
        _join_processes()
    except (RuntimeError, ValueError) as error:
        sys.exit(f"--distributed: cannot find the other processes: {str(error).splitlines()[0]}")
    _log_to(sys.stdout)
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    log.info("vitpyramid %s, jax %s, %s", vitpyramid.__version__, jax.__version__, devices)

    config_file = config_flags.get_config_filename(FLAGS["config"])
    try:
        workdir = open_workdir(FLAGS.workdir or Path("runs", Path(config_file.split(":")[0]).stem))
        validate(CONFIG.value, reference(), jax.device_count(), evaluation=FLAGS.mode == "eval")
        task = make_task(CONFIG.value)
        if FLAGS.mode == "eval" and FLAGS.report:
            found = report.examine(task, workdir)
            log.info("%s", report.write(found, workdir / "report"))
            return 0
        if FLAGS.mode == "eval":
            step, metrics = loop.evaluate_checkpoint(task, workdir)
            log.info("evaluation at step %d: %s", step, task.words(metrics))
            return 0
        workdir.mkdir(parents=True, exist_ok=True)
        summary = loop.train(task, workdir, FLAGS.allow_config_change)
    except ConfigError as error:
        log.error("%s", error)
        return EXIT_CONFIG
    except NonFiniteError as error:
        log.error("%s", error)
        return EXIT_NON_FINITE
    except OSError as error:
        log.error("%s: %s", error.filename, error.strerror) if error.filename else log.error("%s", error)
        return EXIT_IO
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        log.error("another process has ended or cannot be reached; start all of them again to go on from the last save")
        log.error("%s", str(error).splitlines()[0])
        logging.shutdown()
        os._exit(EXIT_PEER)  # leaving in the usual way waits for the others
    # "--workdir FOLDER" in two words may stay: the last one counts.
    program = ["python", sys.argv[0]] if sys.argv[0].endswith(".py") else [Path(sys.argv[0]).stem]
    options = [arg for arg in sys.argv[1:] if not arg.startswith(("--workdir=", "--mode="))] + [f"--workdir={workdir}"]
    log.info("%s", format_summary(summary, task, workdir, shlex.join([*program, *options])))
    return 0 if summary.finished else EXIT_STOPPED


def _preflight() -> int:
    """The report goes to stdout, progress to stderr; a work directory is neither read nor made."""
    try:
        if FLAGS.topology:
            chips.parse_topology(FLAGS.topology)
            chips.use_absent_chips()
        _log_to(sys.stderr)
        options = FLAGS.topology, FLAGS.num_slices, FLAGS.search_compiles, FLAGS.json
        return 0 if preflight.run(CONFIG.value, reference(), *options) else EXIT_CONFIG
    except ConfigError as error:
        sys.exit(str(error))


def _join_processes() -> None:
    """Connects the processes of a run, if it has several."""
    if FLAGS.coordinator_address is None and (FLAGS.num_processes, FLAGS.process_id) != (None, None):
        sys.exit(
            "--num_processes and --process_id go with --coordinator_address, which is missing: each would train alone"
        )
    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    if FLAGS.distributed or FLAGS.coordinator_address:
        jax.distributed.initialize(
            FLAGS.coordinator_address,
            FLAGS.num_processes,
            FLAGS.process_id,
            initialization_timeout=_JOINING,
            heartbeat_timeout_seconds=_PATIENCE,
        )


def _log_to(stream: TextIO) -> None:
    """The package's messages as plain lines, from the first process only; warnings of everything from all."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    first = jax.process_index() == 0  # JAX looks for devices here, and tells of kinds that it does not find
    logging.basicConfig(format="%(message)s", stream=stream, force=True)
    log.setLevel(logging.INFO if first else logging.WARNING)


def _parse_flags(argv: list[str]) -> list[str]:
    """The flags, with the default config; ends with one line where they make no sense."""
    if not any(arg.lstrip("-").split("=")[0] == "config" for arg in argv):
        argv = [argv[0], f"--config={Path(configs.__path__[0]) / 'quickstart.py'}", *argv[1:]]
    try:
        return read_flags(FLAGS, argv)
    except ValueError as error:
        sys.exit(str(error))


def command() -> None:
    """The command `vitpyramid`, and `main.py`."""
    sys.modules["__main__"].__doc__ = __doc__  # what --help shows, and the flags that it lists
    for flag in FLAGS.get_flags_for_module(__name__):
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(main, flags_parser=_parse_flags)
