"""``python -m tests.ring_simulation``: run schedules, or replay one."""

from __future__ import annotations

import sys
from functools import partial

from tests import schedules

from .breaks import BREAKS
from .run import run_one

MODULE = "tests.ring_simulation"
BATCH = 25


def main() -> int:
    """The command line."""
    arguments = schedules.parser(MODULE, __doc__, BREAKS, 1000).parse_args()
    return schedules.command(MODULE, partial(run_one, broken=arguments.broken), arguments, batch=BATCH)


if __name__ == "__main__":
    sys.exit(main())
