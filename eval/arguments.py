"""Command-line arguments of this folder's commands: what is wrong with one is said in one line."""

import argparse
from collections.abc import Callable
from typing import NoReturn


class UsageError(ValueError):
    """What was asked cannot be done as asked; the message names the argument."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError for arguments that it cannot take."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def integer(low: int) -> Callable[[str], int]:
    """The type of an argument that is an integer of at least `low`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least {low}")
        return value

    return parse
