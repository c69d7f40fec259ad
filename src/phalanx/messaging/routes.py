"""To whom a call goes."""

from __future__ import annotations

import msgspec

from phalanx.errors import ConfigError
from phalanx.types import is_dns_label


class Route(msgspec.Struct, frozen=True):
    """To whom a call goes: :data:`Leader`, :data:`Any`, :class:`Node`, :class:`Key`, or :data:`Default`."""


class _Leader(Route, frozen=True):
    def __str__(self) -> str:
        return "leader"


class _Default(Route, frozen=True):
    def __str__(self) -> str:
        return "default"


class _Any(Route, frozen=True):
    def __str__(self) -> str:
        return "any"


class Node(Route, frozen=True):
    """The instance on one node. Raises ConfigError for what cannot be a node id."""

    node: str

    def __post_init__(self) -> None:
        if not isinstance(self.node, str) or not is_dns_label(self.node):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError("to", self.node, "not a node id", "use 1-63 of a-z, 0-9 and inner hyphens")

    def __str__(self) -> str:
        return f"node {self.node}"


class Key(Route, frozen=True):
    """The owner of this key's partition of a ring. Raises ConfigError for what is neither text nor bytes."""

    key: str | bytes

    def __post_init__(self) -> None:
        if not isinstance(self.key, str | bytes):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError("to", self.key, "a key is text or bytes", "write Key(str(it))")
        try:
            _ = self.encoded
        except UnicodeEncodeError as error:
            raise ConfigError("to", self.key, str(error), "use text that is Unicode") from None

    @property
    def encoded(self) -> bytes:
        """What its partition is computed of."""
        return self.key.encode() if isinstance(self.key, str) else self.key

    def __str__(self) -> str:
        return f"key {self.key!r}"


Leader = _Leader()
"""The active instance; the call waits through a failover, within its deadline."""

Any = _Any()
"""Any instance that is ready: of a pool an active one, else also a standby, for methods that are declared
``anywhere``."""

Default = _Default()
"""As the app's pattern has it: :data:`Leader`; of a pool :data:`Any`. For a ring say which key."""
