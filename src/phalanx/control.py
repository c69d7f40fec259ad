"""What a node answers over NATS: its status, and the requests that change something.

Whoever may publish on these subjects may do this; ``phalanx nats permissions`` says who that is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import msgspec

from phalanx.aio import Background
from phalanx.app import App, NodeApp
from phalanx.errors import ConfigError, PhalanxError, SwitchoverRefused
from phalanx.names import Names
from phalanx.ports import Bus, Message, Subscription
from phalanx.switchover import check_switchover, switch_over
from phalanx.types import NodeStatus

log = logging.getLogger("phalanx.control")


class StepDownRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ask the active node of an app to step down. ``to``: the node that should take over."""

    to: str | None = None
    reason: str = ""
    by: str = ""


class StepDownReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """What came of it. ``error`` is empty when the section has ended and the key was released; ``remedy``:
    what to do about it. ``refused``: nothing was changed. ``left_behind``: what did not make it into the
    database's log."""

    node: str
    error: str = ""
    successor: str | None = None
    bad_input: bool = False
    remedy: str = ""
    refused: bool = False
    left_behind: str = ""


class SwitchoverRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ask the active node to hand over if nothing can be lost by it. ``check_only``: only say whether."""

    to: str | None = None
    reason: str = ""
    by: str = ""
    check_only: bool = False


class FailoverRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """Ask the node that is active under ``epoch`` to end at once. One that comes too late does nothing."""

    epoch: int
    to: str | None = None
    reason: str = ""
    by: str = ""


class ControlledNode(Protocol):
    """What the control needs of its node."""

    @property
    def bus(self) -> Bus: ...
    @property
    def names(self) -> Names: ...
    @property
    def node(self) -> str: ...
    @property
    def apps(self) -> dict[str, NodeApp]: ...

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
        actions: dict[str, Callable[[App, Message], Coroutine[Any, Any, StepDownReply]]] = {
            "stepdown": self._step_down,
            "switchover": self._switch_over,
            "failover": self._fail_over,
        }
        for app in self._node.apps.values():
            if not isinstance(app, App):
                continue  # nobody leads it, so there is nothing to hand over
            for action, carry_out in actions.items():

                async def on_request(
                    message: Message, app: App = app, action: str = action, carry_out: Any = carry_out
                ) -> None:
                    if app.has_section:  # only the active node answers
                        # A hand-over may take as long as the hooks do: other messages must not wait for it.
                        work = self._carry_out(carry_out, app, message)
                        self._background.spawn(work, f"{action} of {app.name}")

                subject = names.control_subject(app.name, action)
                self._subscriptions.append(await bus.subscribe(subject, on_request))

    async def stop(self) -> None:
        """No longer answer."""
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        await self._background.close()

    async def _on_status(self, message: Message) -> None:
        if self._node.names.takes_answers(message.reply):
            await self._answer(message, self._node.status())

    async def _carry_out(
        self,
        action: Callable[[App, Message], Coroutine[Any, Any, StepDownReply]],
        app: App,
        message: Message,
    ) -> None:
        node = self._node.node
        try:
            reply = await action(app, message)
        except ConfigError as error:
            reply = StepDownReply(node, error.problem, bad_input=True, remedy=error.remedy)
        except msgspec.MsgspecError as error:
            reply = StepDownReply(node, str(error), bad_input=True)
        except SwitchoverRefused as error:
            reply = StepDownReply(node, error.problem, refused=True, remedy=error.remedy)
        except PhalanxError as error:
            reply = StepDownReply(node, str(error))
        await self._answer(message, reply)

    async def _step_down(self, app: App, message: Message) -> StepDownReply:
        request = msgspec.json.decode(message.data or b"{}", type=StepDownRequest)
        reason = _reason(request.reason or "asked to step down", request.by)
        return StepDownReply(self._node.node, successor=await app.step_down(reason, request.to))

    async def _switch_over(self, app: App, message: Message) -> StepDownReply:
        request = msgspec.json.decode(message.data, type=SwitchoverRequest)
        node = self._node
        if request.check_only:
            successor = await check_switchover(app, node.bus, node.names, request.to)
            return StepDownReply(node.node, successor=successor)
        reason = _reason(f"switchover{f': {request.reason}' if request.reason else ''}", request.by)
        successor = await switch_over(app, node.bus, node.names, reason, request.to)
        return StepDownReply(node.node, successor=successor, left_behind=app.left_behind)

    async def _fail_over(self, app: App, message: Message) -> StepDownReply:
        request = msgspec.json.decode(message.data, type=FailoverRequest)
        reason = _reason(f"forced failover{f': {request.reason}' if request.reason else ''}", request.by)
        successor = await app.fail_over(request.epoch, reason, request.to)
        return StepDownReply(self._node.node, successor=successor)

    async def _answer(self, message: Message, answer: msgspec.Struct) -> None:
        if not self._node.names.takes_answers(message.reply):
            return
        try:
            await self._node.bus.publish(message.reply, msgspec.json.encode(answer))
        except PhalanxError as error:
            log.warning("an answer on %s could not be sent: %s", message.subject, error)


def _reason(what: str, by: str) -> str:
    return f"{what}, asked by {by}" if by else what
