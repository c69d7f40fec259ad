"""A simulator of rings: nodes that join, leave, crash and freeze, over a modelled bucket in NATS.

It drives ``phalanx.decide.ring_plan`` and ``phalanx.decide.ring_ownership`` as ``coord`` does. Sessions are
taken as what ``tests/simulation`` shows them to be: one ends for everybody only after its holder knows so.
"""
