"""Shared by all commands: flags, UTF-8 output, log filters, and errors as one line.

Exit codes: 0 for success, 2 for an error that the user can fix, 130 after Ctrl-C.
"""

import contextlib
import errno
import io
import logging as stdlib_logging
import os
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TextIO

from absl import flags, logging
from ml_collections.config_flags import config_flags
from tqdm import tqdm

from fastslm_jax import config, config_comments
from fastslm_jax.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INTERRUPTED = 130  # the exit code of a shell for a command that Ctrl-C ended
PIPE_CLOSED = 141  # the same for SIGPIPE
_MAX_MESSAGE = 300  # characters of another library's error message
_LOG_FORMAT, _LOG_TIME = "%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"
_BAR_LINE_EVERY = 300.0  # seconds between the lines of a progress bar in a log file

_ENVIRONMENT = {  # read when these libraries are imported
    "TF_CPP_MIN_LOG_LEVEL": "2",  # of TensorFlow, only event files and TFDS are used
    "TF_ENABLE_ONEDNN_OPTS": "0",  # announces itself on every import, whatever the log level
    # Of transformers, only tokenizers and configs are used: it warns that PyTorch is missing.
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
# Messages of libraries on a healthy run that the user can do nothing about.
_HIDDEN = {
    # Orbax warns about what read_only=True asks for: eval, transcribe and export do not write.
    "Given directory is read only",
}


# ------------------------------------------------------------------------------------------- flags

_arguments: list[str] = []  # of the command line, without flags


def parse_flags(required: Sequence[str] = ()) -> list[str]:
    """Parses the command's flags; --help and --print_config print and exit.

    A command calls it before its slow imports: help and wrong flags should not wait for them.

    Args:
        required: flags that must be given, except with --print_config.

    Returns:
        The command line without flags.
    """
    if flags.FLAGS.is_parsed():
        return _arguments
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sys.excepthook, sys.unraisablehook = _on_exception, _on_unraisable
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # text is UTF-8 whatever the locale
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if "config" in flags.FLAGS and "print_config" not in flags.FLAGS:
        flags.DEFINE_bool("print_config", False, "Print every field of the config and exit.")
    with errors_as_one_line():
        if {"-h", "-help", "--help", "--helpfull", "--helpshort"} & set(sys.argv[1:]):
            print(_help())
            sys.exit()
        _arguments[:] = _parse(sys.argv)
        if "print_config" in flags.FLAGS and flags.FLAGS.print_config:
            if flags.FLAGS.config is None:
                raise UserError("--print_config: which one? add --config=FILE")
            print("\n".join(config_comments.describe(flags.FLAGS.config)))
            sys.exit()
        for name in required:
            if flags.FLAGS[name].value is None:
                raise UserError(f"flags: --{name} is required; --help lists all flags")
    return _arguments


class _StepParser(flags.ArgumentParser):
    """A step number, or "best"."""

    syntactic_help = "a step number, or best"

    def parse(self, argument: str | int) -> int | str:
        text = str(argument)
        if text == "best":
            return text
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise ValueError("use a step number such as 1000, or best")
        return int(text)


def define_step(
    name: str, what: str, flag_values: flags.FlagValues = flags.FLAGS, default: str = "the newest"
) -> None:
    """Defines a flag for a step of a checkpoint; its value is for `inference.load.find_step`."""
    text = f"{what}: its step, or best, the one with the best dev scores (default: {default})."
    flags.DEFINE(_StepParser(), name, None, text, flag_values)


OTHER_BASES = (
    "Accept pretrained weights that the checkpoint was not trained on, such as the same model in "
    "another precision."
)


def define_bases(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags of a checkpoint's pretrained models."""
    for name, model in (("whisper", "speech encoder"), ("llm", "language model")):
        text = f"Folder or hub id of the {model} (default: the config's)."
        flags.DEFINE_string(name, None, text, flag_values)
    flags.DEFINE_bool("other_bases", False, OTHER_BASES, flag_values)


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags. Raises UserError for every error that absl and ml_collections raise."""
    if "config" in flags.FLAGS:
        config.accept_new_names(argv)
    try:
        rest = flags.FLAGS(list(argv))
        for name in flags.FLAGS:
            flag = flags.FLAGS[name]
            if config_flags.is_config_flag(flag) and flag.value is not None:
                flag.value.keys()  # a missing config file raises only on access
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, OSError, ValueError) as error:
        lines = str(error).replace("\\n", "\n").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        if any("Traceback" in line for line in lines):
            lines = lines[-1:]
        raise UserError(f"flags: {' '.join(lines)[:_MAX_MESSAGE]}") from None


def _help() -> str:
    """The docstring of the command and its own flags, without those of libraries."""
    texts = [(sys.modules["__main__"].__doc__ or "").strip() + "\n\nFlags:"]
    for module in flags.FLAGS.flags_by_module_dict():
        if module == sys.argv[0] or module.startswith("fastslm_jax"):
            texts.append(flags.FLAGS.module_help(module).split(":\n", 1)[1])
    return "\n".join(texts)


# ------------------------------------------------------------------------------------------ errors


def fail(message: object, code: int = 2, prefix: str = "error: ") -> NoReturn:
    """Prints one line to stderr and exits."""
    report(message, prefix)
    sys.exit(code)


def report(message: object, prefix: str = "error: ") -> None:
    """Prints one line to stderr."""
    with contextlib.suppress(OSError):  # stderr may be a closed pipe
        print_above_bars(f"{prefix}{' '.join(str(message).split())}", sys.stderr)


def print_above_bars(text: str, stream: TextIO) -> None:
    """Prints a line above progress bars instead of into them, in one write.

    So that lines of several processes in one file do not mix.
    """
    tqdm.write(f"{text}\n", file=stream, end="")
    stream.flush()


@contextlib.contextmanager
def errors_as_one_line() -> Iterator[None]:
    """Turns errors that are not bugs into one line and an exit code."""
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()  # here, because errors at exit cannot be caught
    except (UserError, OSError, UnicodeError, KeyboardInterrupt) as error:
        if isinstance(error, OSError):
            _drop_output()
        if isinstance(error, BrokenPipeError):  # the reader has enough, such as `| head`
            sys.exit(PIPE_CLOSED)
        if isinstance(error, KeyboardInterrupt):
            text = f"interrupted: {error}" if str(error) else "interrupted"
            fail(text, INTERRUPTED, prefix="")
        fail(describe(error))
    except Exception as error:  # libraries have their own types for a full disk
        if not any(os.strerror(code) in str(error) for code in DISK_FULL):
            raise
        fail(describe(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))


def _drop_output() -> None:
    """Drops output that cannot be written, which Python would try again at exit."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe(error: Exception) -> str:
    """Example: "runs/x: No space left on device; free some space and run the same command"."""
    if isinstance(error, UnicodeDecodeError):
        return f"a text file is not UTF-8 ({error}); convert it"
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error) or type(error).__name__
    where = " → ".join(_name(name) for name in (error.filename, error.filename2) if name)
    text = f"{where or 'output'}: {error.strerror}"
    if error.errno in DISK_FULL:
        text += "; free some space and run the same command again to resume"
    return text


def _name(path: str | bytes | os.PathLike | int) -> str:
    return f"file {path}" if isinstance(path, int) else display_name(path)


def display_name(path: str | bytes | os.PathLike) -> str:
    """A file name for messages and output; bytes that are not UTF-8 are shown as \\xNN."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _on_exception(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """Ctrl-C while modules are imported is not a bug: one line."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _on_unraisable(arguments: "sys.UnraisableHookArgs") -> None:
    """Errors in callbacks of libraries' threads, apart from those that say nothing new.

    When a write of a checkpoint fails, Orbax closes its event loop while the results of other
    writes still arrive. The save itself raises the failure.
    """
    if str(arguments.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(arguments)


def _log_thread_error(arguments: threading.ExceptHookArgs) -> None:
    """Logs an error in a library's thread as one line.

    The caller sees the error again when it asks for the thread's result.
    """
    lines = str(arguments.exc_value).splitlines() or [arguments.exc_type.__name__]
    name = arguments.thread.name if arguments.thread else "thread"
    logging.warning("%s: %s", name, lines[0][:_MAX_MESSAGE])


# --------------------------------------------------------------------------------------------- log


class _LogHandler(stdlib_logging.Handler):
    """Writes log lines to stderr, above progress bars instead of into them."""

    def emit(self, record: stdlib_logging.LogRecord) -> None:
        try:
            print_above_bars(self.format(record), sys.stderr)
        except OSError:  # stderr is a closed pipe, or its disk is full
            self.handleError(record)

    def handleError(self, record: stdlib_logging.LogRecord) -> None:  # noqa: N802
        """A log line that cannot be written is lost; the run goes on."""


def _is_shown(record: stdlib_logging.LogRecord) -> bool:
    """Log filter: this package's messages, and warnings of libraries.

    Orbax logs a traceback for errors that it also raises, and asyncio for those of Orbax's event
    loops that nobody asked for; those are dropped.
    """
    if record.exc_info and ("/orbax/" in record.pathname or record.name == "asyncio"):
        return False
    if "site-packages" not in record.pathname:
        return True
    message = record.getMessage()
    return record.levelno >= stdlib_logging.WARNING and not any(
        hidden in message for hidden in _HIDDEN
    )


class Bar(tqdm):
    """A progress bar; in a log file, a line every five minutes and one at the end."""

    _last_line: float | None = None  # time of the latest line in a log file, or of the start

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.fp.isatty():
            return super().display(msg, pos)
        now = time.monotonic()
        if self._last_line is None:
            self._last_line = now
        elif now - self._last_line >= _BAR_LINE_EVERY:
            self._last_line = now
            self.fp.write(f"{self}\n")
        return False

    def clear(self, nolock: bool = False) -> None:
        if self.fp.isatty():
            super().clear(nolock)

    def close(self) -> None:
        if not self.disable and not self.fp.isatty():
            self.leave = False  # tqdm would add an empty line
            self.fp.write(f"{self}\n")
        super().close()


class AudioBar(Bar):
    """A progress bar in seconds of audio, which ends at 100 % if a file is longer than announced.

    Args:
        seconds: of all audio.
        title: text before the bar.
        done: seconds that an earlier run has processed.
    """

    def __init__(
        self, seconds: float, title: str, done: float = 0.0, hide: bool | None = False
    ) -> None:
        super().__init__(
            total=seconds,
            initial=min(done, seconds),
            desc=title,
            bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}]",
            mininterval=2,
            disable=hide,
        )

    def update(self, seconds: float = 0.0) -> bool | None:
        return super().update(min(seconds, self.total - self.n))


# --------------------------------------------------------------------------------------------- run


def run(main: Callable[[Sequence[str]], None], required: Sequence[str] = ()) -> NoReturn:
    """Runs a command and exits. Errors that the user can fix are one line and exit code 2.

    Compiled programs are cached between runs in FASTSLM_COMPILATION_CACHE (an empty value disables
    the cache).

    Args:
        main: the command; called with the arguments that are not flags.
        required: flags that must be given (see `parse_flags`).
    """
    argv = parse_flags(required)
    handler = _LogHandler()
    handler.setFormatter(stdlib_logging.Formatter(_LOG_FORMAT, _LOG_TIME))
    handler.addFilter(_is_shown)
    stdlib_logging.root.handlers = [handler]
    logging.set_verbosity(logging.INFO)
    threading.excepthook = _log_thread_error
    with errors_as_one_line():
        import jax  # slow, and not needed to reject flags

        default_cache = os.path.expanduser("~/.cache/fastslm_jax/xla")
        if cache := os.environ.get("FASTSLM_COMPILATION_CACHE", default_cache):
            jax.config.update("jax_compilation_cache_dir", cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
        main(argv)
    sys.exit()
