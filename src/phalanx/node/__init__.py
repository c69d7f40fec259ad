"""One running node: :class:`Node` has open what outlives a session, :mod:`.sessions` has them in turn."""

from phalanx.node.node import Node, timing_of

__all__ = ["Node", "timing_of"]
