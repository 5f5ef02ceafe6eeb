"""`--config=FILE[:VARIANT] --config.KEY=VALUE` for the tools that read a config file."""

import argparse

from absl import flags
from ml_collections import ConfigDict, config_flags

USAGE = "--config=FILE[:VARIANT] [--config.KEY=VALUE ...]"


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, ConfigDict]:
    """The parser's own arguments, and the config that the remaining ones describe; exits with 2 if they make no sense.

    The parser must not allow abbreviations.
    """
    args, rest = parser.parse_known_args(argv)
    # Flags of their own: those of main.py, which has a --config too, belong to the whole process.
    own, argv = flags.FlagValues(), [parser.prog, *rest]
    flag = config_flags.DEFINE_config_file("config", flag_values=own, sys_argv=argv)
    try:
        surplus = own(argv)[1:]
        if flag.value is None:
            parser.error(f"expected {USAGE}")
        if surplus:
            parser.error(f"unexpected arguments {surplus}")
        return args, flag.value.lock()  # a file that could not be loaded is reported on first use
    except flags.UnrecognizedFlagError as error:
        parser.error(f"no such argument: --{error.flagname}")
    except (AttributeError, KeyError) as error:
        missing = error.args[0].args[0] if isinstance(error.args[0], KeyError) else error.args[0]
        parser.error(f"--config has no key {missing}; configs/base.py lists them all")
    except (OSError, TypeError, ValueError, flags.Error) as error:
        parser.error(f"--config: {error}")
