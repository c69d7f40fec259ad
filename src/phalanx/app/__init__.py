"""One app on one node: what it declares (:mod:`.declared`), and what it is while its platform runs.

:class:`App` is made of parts that each have one thing to keep true: its role (:mod:`.role`), its offer to
lead (:mod:`.candidacy`), what it takes part with under one session (:mod:`.term`), and its sections, one
after the other (:mod:`.reigns`). :class:`PoolApp` is the same with seats for an election, so that several
nodes are active. :class:`RingApp` has partitions instead, each with an owner of its own. What a node needs of
any of them is :class:`NodeApp`.
"""

from phalanx.app.app import App
from phalanx.app.contexts import ActiveContext, AppContext, HealthChange, LeaderChange
from phalanx.app.node_app import NodeApp
from phalanx.app.owning import PartitionContext
from phalanx.app.pool_app import PoolApp
from phalanx.app.preparing import PrepareContext
from phalanx.app.ring_app import RingApp

__all__ = [
    "ActiveContext",
    "App",
    "AppContext",
    "HealthChange",
    "LeaderChange",
    "NodeApp",
    "PartitionContext",
    "PoolApp",
    "PrepareContext",
    "RingApp",
]
