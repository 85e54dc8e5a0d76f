"""Outputs: checked before the work starts, written as UTF-8, and replaced as a whole."""

import os
import pathlib
import re
import tempfile

from fastslm_jax.errors import UserError


def check_folder(path: str | os.PathLike, flag: str) -> pathlib.Path:
    """Makes a folder, with its parents, and checks that files can be written there.

    Args:
        flag: the flag that names it, for the message.

    Raises:
        UserError: the folder cannot be made or written, or is the address of a bucket.
    """
    if re.match(r"\w+:/", str(path)):  # a pathlib.Path has one slash of gs://
        raise UserError(
            f"{flag}={path}: is an address, not a folder; mount the bucket and name its folder "
            "(docs/quickstart_tpu.md)"
        )
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror
        raise UserError(
            f"{flag}={path}: cannot write files in this folder ({reason}); choose another one"
        ) from None
    return folder


def check_file(path: str | os.PathLike, flag: str) -> pathlib.Path:
    """Checks like `check_folder` that a file can be written; its content stays as it is."""
    file = pathlib.Path(path)
    if file.is_dir():
        raise UserError(f"{flag}={path}: is a folder; add the name of the file")
    check_folder(file.parent, flag)
    return file


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file; a reader sees the former file or the new one, never a part."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{os.getpid()}.tmp")
    try:
        # A file name that is not UTF-8 may be part of the text.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
