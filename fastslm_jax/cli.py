"""What every command shares: flags, quiet libraries, and errors as one line with exit code 2."""

import errno
import logging as stdlib_logging
import os
import sys
import threading
from collections.abc import Callable, Sequence

import jax
from absl import app, flags, logging

from fastslm_jax.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(list(argv))
        if "config" in flags.FLAGS and flags.FLAGS.config is not None:
            _ = (
                flags.FLAGS.config.keys()
            )  # a config file that is missing is noticed only when it is looked at
        return rest
    except (
        flags.Error,
        AttributeError,
        KeyError,
        TypeError,
        OSError,
        ValueError,
    ) as error:  # all that ml_collections raises
        lines = [
            line.strip() for line in str(error).replace("\\n", "\n").splitlines() if line.strip()
        ]
        told = lines[-1:] if any("Traceback" in line for line in lines) else lines
        raise UserError(f"flags: {' '.join(told)[:300]}") from None


def fail(message: str) -> None:
    """One line to stderr, exit code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def _is_worth_saying(record) -> bool:
    """Our own messages, and warnings of libraries. What the checkpoint library logs with a traceback, it raises too."""
    if record.exc_info and "/orbax/" in record.pathname:
        return False
    return record.levelno >= stdlib_logging.WARNING or "site-packages" not in record.pathname


def _thread_failed(arguments) -> None:
    """Of a library's thread: one line. What it was to do fails where its result is asked for."""
    lines = str(arguments.exc_value).splitlines() or [arguments.exc_type.__name__]
    logging.warning(
        "%s: %s", arguments.thread.name if arguments.thread else "thread", lines[0][:300]
    )


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs a command. `main` raises UserError for what the user can mend."""

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    cache = os.environ.get(
        "FASTSLM_COMPILATION_CACHE", os.path.expanduser("~/.cache/fastslm_jax/xla")
    )
    if (
        cache
    ):  # compiled programs are kept between runs; FASTSLM_COMPILATION_CACHE= switches that off
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_is_worth_saying)

    threading.excepthook = _thread_failed

    def guarded(argv):
        try:
            main(argv)
        except UserError as error:
            fail(error)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            where = error.filename or "the output"
            fail(
                f"{where}: {os.strerror(error.errno)}; make room and run the same command again: it goes on from what is saved"
            )

    def parser(argv):
        try:
            return _parse(argv)
        except UserError as error:
            fail(error)

    app.run(guarded, flags_parser=parser)
