"""Progress line of a long operation."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator


@contextlib.contextmanager
def progress(text: str, interval: float = 5.0) -> Iterator[None]:
    """Prints text to stderr; on a terminal, adds the elapsed seconds and later clears the line."""
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
        yield
        return
    stop, start = threading.Event(), time.monotonic()

    def update() -> None:
        while not stop.wait(interval):
            elapsed = time.monotonic() - start
            print(f"\r{text}: {elapsed:.0f} s", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=update, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        print("\r" + " " * (len(text) + 12) + "\r", end="", file=sys.stderr, flush=True)
