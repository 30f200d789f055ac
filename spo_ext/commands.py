"""What the subcommands of `spo` share."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Private in argparse, but the only name of what add_subparsers returns.
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def fail(error: object, status: int = 1) -> int:
    """Says what went wrong on the standard error; returns the exit status."""
    print(f"spo: error: {error}", file=sys.stderr)
    return status
