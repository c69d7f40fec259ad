"""Asking the active node of an app for a hand-over, and what its refusals mean."""

from __future__ import annotations

import msgspec

from phalanx.control import FailoverRequest, StepDownReply, StepDownRequest, SwitchoverRequest
from phalanx.errors import BusTimeout, BusUnavailable, ConfigError, StepDownFailed, SwitchoverRefused
from phalanx.names import Names
from phalanx.ports import Bus


async def ask_active(
    bus: Bus,
    names: Names,
    app: str,
    action: str,
    request: StepDownRequest | SwitchoverRequest | FailoverRequest,
    to: str | None,
    timeout: float,
) -> StepDownReply:
    """Have the active node of *app* do it; *to* is the node that was named in the *request*.

    Raises ConfigError for a node that cannot take over, SwitchoverRefused: nothing was changed, and
    StepDownFailed, also when nobody answers within *timeout* seconds (then caused by the bus's error).
    """
    subject = names.control_subject(app, action)
    try:
        answer = await bus.request(subject, msgspec.json.encode(request), timeout=timeout)
        reply = msgspec.json.decode(answer.data, type=StepDownReply)
    except (BusUnavailable, BusTimeout) as error:
        raise StepDownFailed(
            app,
            f"its active node did not answer ({error.description})",
            f"see phalanx status; this user may need the right to publish to {subject}",
        ) from error
    except msgspec.MsgspecError as error:
        raise StepDownFailed(app, "the answer is not understood", "do all nodes run this version?") from error
    remedy = reply.remedy or "see: phalanx status"
    if reply.bad_input:
        raise ConfigError("node", to, reply.error, remedy)
    if reply.refused:
        raise SwitchoverRefused(app, reply.error, remedy)
    if reply.error:
        raise StepDownFailed(app, reply.error, remedy)
    return reply


__all__ = ["ask_active"]
