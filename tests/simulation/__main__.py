"""``python -m tests.simulation``: run schedules, or replay one."""

from __future__ import annotations

import sys
from functools import partial

from tests import schedules

from .breaks import BREAKS
from .run import run_one

MODULE = "tests.simulation"
BATCH = 50


def main() -> int:
    """The command line."""
    parser = schedules.parser(MODULE, __doc__, BREAKS, 20_000)
    parser.add_argument("--hold", action="store_true", help="the app holds when NATS is lost")
    arguments = parser.parse_args()
    run = partial(run_one, broken=arguments.broken, holds=arguments.hold)
    options = " --hold" if arguments.hold else ""
    return schedules.command(MODULE, run, arguments, options, batch=BATCH)


if __name__ == "__main__":
    sys.exit(main())
