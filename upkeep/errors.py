"""What the user can mend, told in one line: whatever goes wrong while a file is read or written, and
how a program ends with it."""

import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import soundfile
from safetensors import SafetensorError


class UserError(ValueError):
    """Something the user can mend: `command` prints it as one line and exits with code 2."""


class DataError(UserError):
    """Bad content of a file; the message names the file, the line and the reason."""


# What libraries say, in errors of their own, where memory, handles or a disk fail.
OF_THE_MACHINE = re.compile(
    r"allocate memory|out of memory|malloc|unable to (?:open|stat|mmap)|os error|system error|"
    r"DataLoader worker \(pid",
    re.I,
)


@contextlib.contextmanager
def errors_of_reading(file, expected: str, mend: str = "restore it, or get another"):
    """Around what reads a file that somebody else made: whatever that raises becomes one line with
    the file's name. It is a DataError only where the content is not what was expected; that a file
    cannot be read now says nothing of the file."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # each library has its own; a panic of Rust is no Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if isinstance(error, (OSError, MemoryError)) or OF_THE_MACHINE.search(reason):
            later = f"when it can, the same command goes on; if it never can, {mend}"
            raise UserError(f"{file} cannot be read now ({reason}); {later}") from None
        if is_lfs_pointer(file):
            reason = "it is a pointer of Git LFS, not the file itself"
            mend = "run `git lfs pull` where it comes from"
        raise DataError(f"{file} cannot be read as {expected} ({reason}); {mend}") from None


def is_lfs_pointer(file) -> bool:
    with contextlib.suppress(OSError, ValueError), open(file, "rb") as content:
        return content.read(42) == b"version https://git-lfs.github.com/spec/v1"
    return False


@contextlib.contextmanager
def errors_of_writing(path: Path):
    """One line with the path from whatever goes wrong while it is written: no room, for one."""
    try:
        yield
    except (OSError, SafetensorError, soundfile.SoundFileError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} cannot be written ({reason}); when it can, the same command goes on"
        ) from None


def command(main, **handed_in):
    """Run a program from the command line, main(**handed_in): an error that the user can mend is
    one line on stderr and exit code 2."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))
    # A log file shows each line as it comes, and what a terminal cannot show is escaped.
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's cannot
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        main(**handed_in)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        try:
            print(flush=True)  # is it stdout that nobody reads?
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
        raise
    except KeyboardInterrupt:
        print("interrupted with nothing to save; the same command goes on", file=sys.stderr)
        sys.exit(130)
