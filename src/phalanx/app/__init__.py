"""One app on one node: what it declares (:mod:`.declared`), and what it is while its platform runs.

:class:`App` is made of parts that each have one thing to keep true: its role (:mod:`.role`), its offer to
lead (:mod:`.candidacy`), what it takes part with under one session (:mod:`.term`), and its sections, one
after the other (:mod:`.reigns`).
"""

from phalanx.app.app import App
from phalanx.app.contexts import ActiveContext, AppContext, HealthChange, LeaderChange

__all__ = ["ActiveContext", "App", "AppContext", "HealthChange", "LeaderChange"]
