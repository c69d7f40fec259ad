"""Until phalanx.config has them."""

from __future__ import annotations

import msgspec


class Secret(msgspec.Struct, frozen=True):
    value: str = ""

    def reveal(self) -> str:
        return self.value


class EmbeddedNats(msgspec.Struct, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    port: int = 4222
    cluster_port: int = 6222
    routes: tuple[str, ...] = ()
    store_dir: str = ""
    sync: str = "always"
    user: str = ""
    password: Secret = Secret()
    token: Secret = Secret()
    route_secret: Secret = Secret()
    monitor_port: int = 0
    server_name: str = ""
    max_store: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""


class NatsOptions(msgspec.Struct, frozen=True, kw_only=True):
    servers: tuple[str, ...] = ()
    user: str = ""
    password: Secret = Secret()
    token: Secret = Secret()
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
