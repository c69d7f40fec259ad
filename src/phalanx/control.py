"""What a node answers over NATS: its status, and the requests that change something.

Whoever may publish on these subjects may do this; ``phalanx nats permissions`` says who that is.
"""

from __future__ import annotations

import logging
from typing import Protocol

import msgspec

from phalanx.aio import Background
from phalanx.app import App
from phalanx.errors import ConfigError, NotActive, Paused, PhalanxError
from phalanx.names import Names
from phalanx.ports import Bus, Message, Subscription
from phalanx.types import NodeStatus

log = logging.getLogger("phalanx.control")


class StepDownRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ask the active node of an app to step down. ``to``: the node that should take over."""

    to: str | None = None
    reason: str = ""
    by: str = ""


class StepDownReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """What came of it. ``error`` is empty when the section has ended and the key was released."""

    node: str
    error: str = ""
    successor: str | None = None
    bad_input: bool = False


class ControlledNode(Protocol):
    """What the control needs of its node."""

    @property
    def bus(self) -> Bus: ...
    @property
    def names(self) -> Names: ...
    @property
    def node(self) -> str: ...
    @property
    def apps(self) -> dict[str, App]: ...

    def status(self) -> NodeStatus: ...


class Control:
    """The subscriptions of one node."""

    def __init__(self, node: ControlledNode) -> None:
        self._node = node
        self._subscriptions: list[Subscription] = []
        self._background = Background(log)

    async def start(self) -> None:
        """Begin to answer."""
        bus, names = self._node.bus, self._node.names
        self._subscriptions.append(await bus.subscribe(names.status_subject(), self._on_status))
        for app in self._node.apps.values():

            async def on_step_down(message: Message, app: App = app) -> None:
                self._on_step_down(app, message)

            subject = names.control_subject(app.name, "stepdown")
            self._subscriptions.append(await bus.subscribe(subject, on_step_down))

    async def stop(self) -> None:
        """No longer answer."""
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        await self._background.close()

    async def _on_status(self, message: Message) -> None:
        if message.reply:
            await self._answer(message, self._node.status())

    def _on_step_down(self, app: App, message: Message) -> None:
        if not app.has_section:
            return  # only the active node answers
        # A hand-over may take as long as the hooks do: other messages must not wait for it.
        self._background.spawn(self._step_down(app, message), f"step down {app.name}")

    async def _step_down(self, app: App, message: Message) -> None:
        node = self._node.node
        try:
            request = msgspec.json.decode(message.data or b"{}", type=StepDownRequest)
            by = f", asked by {request.by}" if request.by else ""
            reason = f"{request.reason or 'asked to step down'}{by}"
            reply = StepDownReply(node, successor=await app.step_down(reason, request.to))
        except (ConfigError, msgspec.DecodeError) as error:
            reply = StepDownReply(node, str(error), bad_input=True)
        except (NotActive, Paused) as error:
            reply = StepDownReply(node, str(error))
        await self._answer(message, reply)

    async def _answer(self, message: Message, answer: msgspec.Struct) -> None:
        if not message.reply:
            return
        try:
            await self._node.bus.publish(message.reply, msgspec.json.encode(answer))
        except PhalanxError as error:
            log.warning("an answer on %s could not be sent: %s", message.subject, error)
