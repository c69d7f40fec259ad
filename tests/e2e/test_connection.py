"""The connection to NATS: every way to log in, TLS, and what happens when it breaks."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import nkeys
import pytest
from nats.aio.transport import TcpTransport
from tests.waiting import until

from phalanx.bus.connection import NatsBus
from phalanx.config import NatsOptions, Secret
from phalanx.errors import BusTimeout, BusUnavailable, NatsUnusable, WrongRevision
from phalanx.ports import Connection, Fence
from phalanx.testing.faults import TcpProxy
from phalanx.testing.nats import NatsCluster, NatsServer


async def connect(options: NatsOptions, **more: Any) -> NatsBus:
    return await NatsBus.connect(options, name="test", **{"ping_interval": 0.2, "timeout": 5.0, **more})


async def echoes(bus: NatsBus) -> bool:
    """Whether a request gets its answer through this connection."""
    subscription = await bus.subscribe("echo", lambda m: bus.publish(m.reply, m.data))
    answer = await bus.request("echo", b"hello")
    await subscription.unsubscribe()
    return answer.data == b"hello"


# --- logging in


def _seed(prefix: bytes) -> tuple[bytes, nkeys.KeyPair]:
    seed = nkeys.encode_seed(os.urandom(32), prefix)
    return bytes(seed), nkeys.from_seed(bytearray(seed))


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _jwt(issuer: nkeys.KeyPair, subject: str, kind: str, name: str, **fields: Any) -> str:
    """A token as NATS wants it (version 2): claims signed by *issuer*, its id a hash of the claims."""
    claims: dict[str, Any] = {
        "iss": issuer.public_key.decode(),
        "sub": subject,
        "name": name,
        "iat": int(time.time()),
        "nats": {"type": kind, "version": 2, **fields},
    }
    digest = hashlib.new("sha256", json.dumps(claims).encode()).digest()
    claims["jti"] = base64.b32encode(digest).rstrip(b"=").decode()
    head = _b64(json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}).encode())
    body = _b64(json.dumps(claims).encode())
    return f"{head}.{body}.{_b64(issuer.sign(f'{head}.{body}'.encode()))}"


async def test_user_and_password() -> None:
    """User and password let in; a wrong password is refused at once, with the remedy and without it shown."""
    with NatsServer(extra="authorization { user: u, password: right }", system_user=False) as server:
        bus = await connect(NatsOptions(urls=(server.url(),), user="u", password=Secret("right")))
        assert await echoes(bus)
        await bus.close()
        began = time.monotonic()
        with pytest.raises(NatsUnusable, match=r"check the login") as caught:
            await connect(NatsOptions(urls=(server.url(),), user="u", password=Secret("wrong-one")))
        assert time.monotonic() - began < 3
        assert "wrong-one" not in str(caught.value)


async def test_token() -> None:
    """A token lets in."""
    with NatsServer(extra="authorization { token: sesame }", system_user=False) as server:
        bus = await connect(NatsOptions(urls=(server.url(),), token=Secret("sesame")))
        assert await echoes(bus)
        await bus.close()


@pytest.mark.parametrize("as_file", [False, True])
async def test_nkey(tmp_path: Path, as_file: bool) -> None:
    """An NKey seed, given or in a file, lets in."""
    seed, pair = _seed(nkeys.PREFIX_BYTE_USER)
    extra = f"authorization {{ users: [ {{ nkey: {pair.public_key.decode()} }} ] }}"
    with NatsServer(extra=extra, system_user=False) as server:
        if as_file:
            path = tmp_path / "seed"
            path.write_bytes(seed)
            options = NatsOptions(urls=(server.url(),), nkey_seed_file=str(path))
        else:
            options = NatsOptions(urls=(server.url(),), nkey_seed=Secret(seed.decode()))
        bus = await connect(options)
        assert await echoes(bus)
        await bus.close()


async def test_credentials_file(tmp_path: Path) -> None:
    """A credentials file (JWT and seed) lets in."""
    _, operator = _seed(nkeys.PREFIX_BYTE_OPERATOR)
    _, account = _seed(nkeys.PREFIX_BYTE_ACCOUNT)
    user_seed, user = _seed(nkeys.PREFIX_BYTE_USER)
    account_id = account.public_key.decode()
    unlimited = {"subs": -1, "conn": -1, "leaf": -1, "imports": -1, "exports": -1, "data": -1, "payload": -1}
    operator_jwt = _jwt(operator, operator.public_key.decode(), "operator", "O")
    account_jwt = _jwt(operator, account_id, "account", "A", limits={**unlimited, "wildcards": True})
    _, system = _seed(nkeys.PREFIX_BYTE_ACCOUNT)
    system_id = system.public_key.decode()
    limits = {**unlimited, "wildcards": True}
    system_jwt = _jwt(operator, system_id, "account", "SYS", limits=limits)
    user_jwt = _jwt(account, user.public_key.decode(), "user", "U", subs=-1, data=-1, payload=-1)
    creds = tmp_path / "user.creds"
    creds.write_text(
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user_seed.decode()}\n------END USER NKEY SEED------\n"
    )
    extra = (
        f"operator: {operator_jwt}\nsystem_account: {system_id}\nresolver: MEMORY\n"
        f"resolver_preload: {{ {account_id}: {account_jwt}, {system_id}: {system_jwt} }}"
    )
    with NatsServer(extra=extra, system_user=False) as server:
        bus = await connect(NatsOptions(urls=(server.url(),), credentials=str(creds)))
        assert await echoes(bus)
        await bus.close()


def _certificates(folder: Path) -> None:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1,DNS:nats.test\n")
    openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem",
            "-days", "2", "-subj", "/CN=test ca")  # fmt: skip
    for name in ("server", "client"):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.csr",
                "-subj", f"/CN={name}")  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                "-CAcreateserial", "-out", f"{name}.pem", "-days", "2", "-extfile", "ext")  # fmt: skip


async def test_tls_with_client_certificates(tmp_path: Path) -> None:
    """TLS with our own CA and a client certificate; without the CA the server is not believed."""
    _certificates(tmp_path)
    extra = (
        f'tls {{ cert_file: "{tmp_path}/server.pem", key_file: "{tmp_path}/server.key", '
        f'ca_file: "{tmp_path}/ca.pem", verify: true }}'
    )
    with NatsServer(extra=extra) as server:
        url = server.url().replace("nats:", "tls:")
        files = {f"tls_{k}": str(tmp_path / v) for k, v in
                 (("ca", "ca.pem"), ("cert", "client.pem"), ("key", "client.key"))}  # fmt: skip
        bus = await connect(NatsOptions(urls=(url,), **files))
        assert await echoes(bus)
        await bus.close()
        named = await connect(NatsOptions(urls=(url,), tls_hostname="nats.test", **files))
        await named.close()
        with pytest.raises(NatsUnusable, match="tls_ca"):
            await connect(NatsOptions(urls=(url,)))


async def test_unreachable_servers_are_named() -> None:
    """Nobody listens: one line with the address and what to do."""
    with pytest.raises(NatsUnusable, match=r"nats://127\.0\.0\.1:9.*check nats\.urls"):
        await connect(NatsOptions(urls=("nats://127.0.0.1:9",)), timeout=0.5)


# --- when it breaks


async def _bucket(bus: NatsBus, replicas: int = 1) -> None:
    await bus.api(
        "STREAM.CREATE.KV_t",
        {
            "name": "KV_t",
            "subjects": ["$KV.t.>"],
            "num_replicas": replicas,
            "max_msgs_per_subject": 4,
            "allow_direct": True,
            "allow_atomic": True,
            "republish": {"src": "$KV.t.>", "dest": "w.t.>"},
        },
    )


async def test_nothing_is_sent_while_disconnected(nats_server: NatsServer) -> None:
    """A write while the server is away fails at once, and does not arrive when it is back."""
    bus = await connect(NatsOptions(urls=(nats_server.url(),)))
    await _bucket(bus)
    events: list[Connection] = []
    bus.on_connection(events.append)
    nats_server.kill()
    await until(lambda: not bus.is_connected)
    with pytest.raises(BusUnavailable):
        await bus.write("$KV.t.late", b"1")
    nats_server.start()
    await until(lambda: bus.is_connected)
    assert await bus.read("KV_t", "$KV.t.late") is None
    assert events == [Connection.DISCONNECTED, Connection.CONNECTED]
    await bus.close()


async def test_request_on_a_broken_connection_fails_at_once(nats_server: NatsServer) -> None:
    """The server is killed while a request waits: BusTimeout (outcome unknown) long before its timeout."""
    bus = await connect(NatsOptions(urls=(nats_server.url(),)))
    await bus.subscribe("void", lambda m: None)
    waiting = asyncio.create_task(bus.request("void", b"", timeout=60))
    await asyncio.sleep(0)
    nats_server.kill()
    with pytest.raises(BusTimeout, match="unknown"):
        await asyncio.wait_for(waiting, 5)
    await bus.close()


async def test_silent_server_is_given_up_for_another(nats_cluster: NatsCluster) -> None:
    """A server that hangs (SIGSTOP) is left after three pings, for another one; subscriptions go along."""
    bus = await connect(NatsOptions(urls=tuple(nats_cluster.urls)))
    got: list[bytes] = []
    await bus.subscribe("s", lambda m: got.append(m.data))
    hanging = nats_cluster.index(bus.server_name)
    nats_cluster.freeze(hanging)
    await until(lambda: bus.is_connected and nats_cluster.index(bus.server_name) != hanging)
    await bus.publish("s", b"1")
    await until(lambda: got == [b"1"])
    nats_cluster.thaw(hanging)
    await bus.close()


async def test_close_is_bounded_on_a_pulled_cable(nats_server: NatsServer) -> None:
    """close() returns within seconds although nothing is acknowledged any more."""
    async with TcpProxy("127.0.0.1", nats_server.port()) as link:
        bus = await connect(NatsOptions(urls=(link.url,)))
        link.black_hole()
        await asyncio.wait_for(bus.close(), 5)


async def test_reconnection_that_succeeds_while_the_bus_is_closed(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11's wait_for swallows a cancellation that comes with the result: no socket is left open."""
    bus = await connect(NatsOptions(urls=tuple(nats_server.urls)))
    connect_really = TcpTransport.connect
    made: list[asyncio.StreamWriter] = []
    closing: list[asyncio.Task[None]] = []

    async def connect_and_miss_the_cancellation(self: TcpTransport, *args: Any, **options: Any) -> None:
        if not closing:
            closing.append(asyncio.create_task(bus.close()))
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(5)
            raise OSError("refused")
        await closing[0]
        await connect_really(self, *args, **options)
        assert self._io_writer is not None
        made.append(self._io_writer)

    monkeypatch.setattr(TcpTransport, "connect", connect_and_miss_the_cancellation)
    await bus.switch_server("a test")
    await until(lambda: made)
    await until(lambda: made[0].transport.is_closing())


async def test_server_that_was_left_is_not_the_first_to_be_tried(nats_cluster: NatsCluster) -> None:
    """A server that stands still takes connections and says nothing: another one is reached at once."""
    bus = await connect(NatsOptions(urls=tuple(nats_cluster.urls)), ping_interval=1.0)
    for _ in range(8):
        left = nats_cluster.index(bus.server_name)
        nats_cluster.freeze(left)
        began = time.monotonic()
        await bus.switch_server("a test")
        await until(lambda: bus.is_connected)
        took = time.monotonic() - began
        nats_cluster.thaw(left)
        assert bus.server_name != nats_cluster.name(left)
        assert took < 1.9, "it has waited for the server that it had left"  # that would be 2 s
    await bus.close()


async def test_client_that_the_server_ended_for_good_is_replaced(tmp_path: Path) -> None:
    """The login is refused during a restart, which closes nats-py's client: a new one takes over."""
    with NatsServer(extra="authorization { user: u, password: p }", system_user=False) as server:
        bus = await connect(NatsOptions(urls=(server.url(),), user="u", password=Secret("p")))
        got: list[bytes] = []
        await bus.subscribe("s", lambda m: got.append(m.data))
        conf = server.directory / "0.conf"
        right = conf.read_text()
        conf.write_text(right.replace("password: p", "password: other"))
        os.kill(server.pid(), 1)  # SIGHUP: reload; the server disconnects who is no longer allowed
        await until(lambda: not bus.is_connected)
        conf.write_text(right)
        os.kill(server.pid(), 1)
        await until(lambda: bus.is_connected, 20)
        await bus.publish("s", b"1")
        await until(lambda: got == [b"1"])
        await bus.close()


async def test_g2_server_refuses_a_fenced_write_of_an_old_epoch(nats_cluster: NatsCluster) -> None:
    """Once the leader key has changed, fenced writes with the old epoch are refused, single or in a batch."""
    bus = await connect(NatsOptions(urls=tuple(nats_cluster.urls)))
    await _bucket(bus, 3)
    leader = "$KV.t.election.leader"
    old = await bus.write(leader, b"a", expect=0)
    revision = await bus.write("$KV.t.kv.x", b"1", fence=Fence(leader, old))
    new = await bus.write(leader, b"b", expect=old)
    for expect in (None, revision):
        with pytest.raises(WrongRevision):
            await bus.write("$KV.t.kv.x", b"2", expect=expect, fence=Fence(leader, old))
        await bus.write("$KV.t.kv.x", b"3", fence=Fence(leader, new))
        revision = await bus.write("$KV.t.kv.x", b"3", fence=Fence(leader, new))
    record = await bus.read("KV_t", "$KV.t.kv.x")
    assert record is not None
    assert record.data == b"3"
    await bus.close()


async def test_snapshot_of_more_subjects_than_one_answer_holds(nats_server: NatsServer) -> None:
    """1,500 keys: all of them, each once, with its last value."""
    bus = await connect(NatsOptions(urls=(nats_server.url(),)))
    await _bucket(bus)
    for round_number in (b"old", b"new"):
        await asyncio.gather(*(bus.write(f"$KV.t.k{i}", round_number) for i in range(1500)))
    records = await bus.snapshot("KV_t", "$KV.t.>")
    assert {r.subject for r in records} == {f"$KV.t.k{i}" for i in range(1500)}
    assert {r.data for r in records} == {b"new"}
    await bus.close()
