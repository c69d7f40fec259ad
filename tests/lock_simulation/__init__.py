"""Locks and semaphores in virtual time: the real ``phalanx.coord.locks`` over a NATS that loses, delays and
repeats nothing on purpose but what the network may; sessions that end, nodes that crash; checked after every
write."""
