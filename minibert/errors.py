"""How bad input ends: one clear line on standard error and exit status 2, never a traceback.

A traceback is for our own faults. What a user gives and is wrong (a file, a flag, a checkpoint)
raises `InputError`, whose message names the thing, what was found and what was expected.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

BAD_INPUT_STATUS = 2
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as shells report it


class InputError(ValueError):
    """Something the user gave is wrong."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line (the usage text is what `--help` is for).

    Flags are written out: an abbreviation that is clear today may not be tomorrow.
    """

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        self.exit(BAD_INPUT_STATUS, f"error: {message} (see {self.prog} --help)\n")


def run_command(main: Callable[[], None]) -> int:
    """Run a command's `main` and return its exit status: 0, 2 (bad input) or 130 (Ctrl-C)."""
    try:
        main()
    except (InputError, OSError) as error:
        message = " ".join(str(error).split())  # names from a file may hold line breaks
        print(f"error: {message}", file=sys.stderr)
        return BAD_INPUT_STATUS
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED_STATUS
    return 0
