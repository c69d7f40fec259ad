"""How a connection logs in and encrypts, and what its errors mean to whoever has configured it."""

from __future__ import annotations

import ssl
from typing import Any

from phalanx.config.node import NatsOptions
from phalanx.errors import NatsUnusable


def plain(error: BaseException | None) -> str:
    """What *error* says; many of nats-py's say nothing but their kind."""
    if error is None:
        return "no answer"
    text = str(error).strip()
    return text if text else type(error).__name__


def is_refusal(error: Exception) -> bool:
    """Whether trying again in a moment is pointless: login or certificate are wrong."""
    text = str(error).lower()
    return (
        "authorization" in text or "authentication" in text or isinstance(error, ssl.SSLCertVerificationError)
    )


def remedy(error: BaseException | None, timeout: float) -> str:
    """What to do about a connection that did not come about within *timeout* seconds."""
    if isinstance(error, ssl.SSLError):
        return "check nats.tls_ca and the names in the servers' certificates (nats.tls_hostname)"
    if isinstance(error, Exception) and is_refusal(error):
        return "check the login (nats.user, nats.password, nats.token, nats.nkey_seed, nats.credentials)"
    return f"check nats.urls, and that a nats-server listens there (tried for {timeout:g} s)"


def login(options: NatsOptions) -> dict[str, Any]:
    """How it logs in, as arguments of nats-py's ``connect``."""
    given: dict[str, Any] = {}
    if options.user:
        given["user"], given["password"] = options.user, options.password.reveal()
    if options.token:
        given["token"] = options.token.reveal()
    if options.nkey_seed:
        given["nkeys_seed_str"] = options.nkey_seed.reveal()
    if options.nkey_seed_file:
        given["nkeys_seed"] = options.nkey_seed_file
    if options.credentials:
        given["user_credentials"] = options.credentials
    return given


def tls(options: NatsOptions) -> dict[str, Any]:
    """How it encrypts, likewise. Raises NatsUnusable for files that cannot be used."""
    wanted = options.tls_ca or options.tls_cert or any(url.startswith("tls:") for url in options.urls)
    if not wanted:
        return {}
    try:
        context = ssl.create_default_context(cafile=options.tls_ca or None)
        if options.tls_cert:
            context.load_cert_chain(options.tls_cert, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        which = options.tls_ca or options.tls_cert
        raise NatsUnusable(
            f"the TLS files cannot be used ({which}): {error}",
            "check nats.tls_ca, nats.tls_cert, nats.tls_key",
        ) from error
    return {"tls": context, **({"tls_hostname": options.tls_hostname} if options.tls_hostname else {})}


def without_login(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


__all__ = ["is_refusal", "login", "plain", "remedy", "tls", "without_login"]
