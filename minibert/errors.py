"""How bad input ends: one clear line on standard error and exit status 2, never a traceback.

A traceback is for our own faults. What a user gives and is wrong (a file, a flag, a checkpoint)
raises `InputError`, whose message names the thing, what was found and what was expected.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

BAD_INPUT_STATUS = 2
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells report it
CLOSED_PIPE_STATUS = 141  # 128 + SIGPIPE


class InputError(ValueError):
    """Something the user gave is wrong."""


class Stopped(Exception):
    """A command ends before its work is done, for a reason that has been told already."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line (the usage text is what `--help` is for).

    Flags are written out: an abbreviation that is clear today may not be tomorrow.
    """

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise InputError(f"{message} (see {self.prog} --help)")


def in_one_line(error: Exception) -> str:
    """What an error says: of the system's own, the file first."""
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    words = " ".join(message.split())  # names from a file may hold line breaks, or move the cursor
    return "".join(letter if letter.isprintable() else "?" for letter in words)


def run_command(main: Callable[[], None]) -> int:
    """Run a command's `main` and return its exit status.

    0, 2 (bad input), 130 (Ctrl-C), 141 (who reads our output has gone), or the one that it stopped
    with.
    """
    try:
        main()
        sys.stdout.flush()
    except Stopped as stopped:
        return stopped.status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to say
        return CLOSED_PIPE_STATUS
    except (InputError, OSError) as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        return BAD_INPUT_STATUS
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED_STATUS
    return 0
