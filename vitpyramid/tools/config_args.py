"""`--config=FILE[:VARIANT] --config.KEY=VALUE` on a command line: `main.py`'s, and of tools that read a config."""

import argparse
import re
import traceback
from collections.abc import Iterable

from absl import flags
from ml_collections import ConfigDict, config_flags

from vitpyramid.tasks import ConfigError
from vitpyramid.train.config import find_config, flatten, nearest, reference, validate

USAGE = "--config=FILE[:VARIANT] [--config.KEY=VALUE ...]"


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, ConfigDict]:
    """The parser's own arguments, and the config that the remaining ones describe; exits with 2 if they make no sense.

    The parser must not allow abbreviations.
    """
    args, rest = parser.parse_known_args(argv)
    # Flags of their own: those of main.py, which has a --config too, belong to the whole process.
    own, argv = flags.FlagValues(), [parser.prog, *rest]
    flag = config_flags.DEFINE_config_file("config", flag_values=own, sys_argv=argv)
    options = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
    try:
        surplus = read_flags(own, argv, options)[1:]
    except ValueError as error:
        parser.error(str(error))
    if flag.value is None:
        parser.error(f"expected {USAGE}")
    if surplus:
        parser.error(f"unexpected arguments {surplus}")
    try:
        validate(flag.value, reference(), device_count=1, evaluation=True)
    except ConfigError as error:
        parser.error(str(error))
    return args, flag.value


def read_flags(values: flags.FlagValues, argv: list[str], others: Iterable[str] = ()) -> list[str]:
    """Gives flags, one of them `config`, their values; returns what is no flag, the program first.

    Args:
      others: names of arguments that somebody else has read, to suggest.

    Raises:
      ValueError: in a line, what is wrong, with the nearest names where one does not exist.
    """
    argv = [*argv, ""]
    for place, arg in enumerate(argv[:-1]):
        if re.match("--?config=.", arg):
            argv[place] = f"--config={_found(arg.partition('=')[2])}"
        elif arg in ("-config", "--config") and argv[place + 1]:
            argv[place + 1] = _found(argv[place + 1])
    argv.pop()
    try:
        rest = values(argv)
        if values["config"].value is not None:
            values["config"].value.lock()  # a file that could not be loaded is reported on first use
        return rest
    except flags.UnrecognizedFlagError as error:
        hint = nearest(error.flagname, {*values, *others})
        raise ValueError(f"no such argument: --{error.flagname}{hint}") from error
    except (AttributeError, KeyError) as error:
        raise ValueError(_unknown_key(argv) or f"--config: {error}") from error
    except (OSError, SyntaxError, TypeError, ValueError, flags.Error) as error:
        cause = error
        while "Traceback" in str(cause):  # ml_collections' of an error in a config's own code, which it hides
            cause = cause.__context__
        raise ValueError(str(cause) if isinstance(cause, flags.Error) else f"--config: {cause}") from error
    except Exception as error:  # a config is a program, which may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = isinstance(error, ModuleNotFoundError) and error.name == "configs"
        hint = "; the package's configs are in vitpyramid.configs" if ours else ""
        what = f"{place.filename}, line {place.lineno}: {type(error).__name__}: {error}{hint}"
        raise ValueError(f"--config: {what}") from error


def _found(name: str) -> str:
    """`find_config`, whose error names the argument."""
    try:
        return find_config(name)
    except ConfigError as error:
        raise ValueError(f"--{error}") from error


def _unknown_key(argv: list[str]) -> str:
    """What to say of the first `--config.KEY` of `argv` that its config does not have; nothing if it has them all."""
    files = [arg for arg in argv if re.match("--?config=", arg)]
    own = flags.FlagValues()
    flag = config_flags.DEFINE_config_file("config", flag_values=own, sys_argv=[argv[0], *files])
    try:
        own([argv[0], *files])
        keys = flatten(flag.value)
    except Exception:  # the config's own code raised the error
        return ""
    for arg in argv:
        key = re.match(r"--?config\.([^=]+)", arg)
        if key and key[1] not in keys and not any(known.startswith(f"{key[1]}.") for known in keys):
            return f"--config has no key {key[1]!r}{nearest(key[1], keys)}; configs/base.py lists them all"
    return ""
