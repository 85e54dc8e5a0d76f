"""Shared by all commands: flags, log filters, and user errors as one line with exit code 2."""

import errno
import logging as stdlib_logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
from absl import app, flags, logging

from fastslm_jax.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_MESSAGE = 300  # characters of another library's error message


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses flags. Raises UserError for every error that absl and ml_collections raise."""
    try:
        rest = flags.FLAGS(list(argv))
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            flags.FLAGS.config.keys()  # a missing config file raises only on access
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, OSError, ValueError) as error:
        lines = str(error).replace("\\n", "\n").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        if any("Traceback" in line for line in lines):
            lines = lines[-1:]
        raise UserError(f"flags: {' '.join(lines)[:_MAX_MESSAGE]}") from None


def fail(message: object) -> NoReturn:
    """Prints a one-line error to stderr and exits with code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def _is_shown(record: stdlib_logging.LogRecord) -> bool:
    """Log filter: this package's messages, and warnings of libraries.

    Orbax logs a traceback for errors that it also raises; those are dropped.
    """
    if record.exc_info and "/orbax/" in record.pathname:
        return False
    return record.levelno >= stdlib_logging.WARNING or "site-packages" not in record.pathname


def _log_thread_error(arguments: threading.ExceptHookArgs) -> None:
    """Logs an error in a library's thread as one line.

    The caller sees the error again when it asks for the thread's result.
    """
    lines = str(arguments.exc_value).splitlines() or [arguments.exc_type.__name__]
    name = arguments.thread.name if arguments.thread else "thread"
    logging.warning("%s: %s", name, lines[0][:_MAX_MESSAGE])


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs a command and exits: code 0 on success, code 2 and a one-line message for a user error.

    Compiled programs are cached between runs in FASTSLM_COMPILATION_CACHE (an empty value disables
    the cache).

    Args:
        main: the command; called with the arguments that are not flags.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    default_cache = os.path.expanduser("~/.cache/fastslm_jax/xla")
    if cache := os.environ.get("FASTSLM_COMPILATION_CACHE", default_cache):
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_shown)
    threading.excepthook = _log_thread_error

    def guarded_main(argv: Sequence[str]) -> None:
        try:
            main(argv)
        except UserError as error:
            fail(error)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            where = error.filename or "the output"
            fail(
                f"{where}: {os.strerror(error.errno)}; free some space and run the same command "
                "again to resume"
            )

    def flags_parser(argv: Sequence[str]) -> list[str]:
        try:
            return _parse_flags(argv)
        except UserError as error:
            fail(error)

    app.run(guarded_main, flags_parser=flags_parser)
