"""The keeper: a small process beside each node that holds the node's session.

User code can block the node's event loop, leak memory or crash it. None of that may decide by
accident who is active, so the session is renewed here, and whatever the node had running is killed
from here when the node cannot do it itself.
"""
