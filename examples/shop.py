"""A web service that calls an app: as many of it as you like, anywhere, behind any balancer.

It is no node, it only connects to NATS: requests wait while the app in orders.py moves, and do not fail::

    uvicorn examples.shop:app --port 8000
    curl -d '{"item": "apple", "count": 3}' http://127.0.0.1:8000/orders
    curl http://127.0.0.1:8000/orders/apple
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from examples.orders_api import Order, Orders
from phalanx import Busy, CallError, NoLeader, Platform, with_options

NATS = os.environ.get("PHALANX_NATS", "nats://127.0.0.1:4222")


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncGenerator[dict[str, Any]]:
    """One connection, and one stub on it, for all requests."""
    async with Platform.client("prod", NATS) as client:
        yield {"orders": client.api("orders").stub(Orders, timeout=10)}


async def place(request: Request) -> Response:
    """``POST /orders``: the order goes to whichever node is active, and is checked there."""
    try:
        order = msgspec.json.decode(await request.body(), type=Order)
    except msgspec.MsgspecError as error:
        return JSONResponse({"error": str(error)}, 400)
    orders: Orders = request.state.orders
    receipt = await orders.place(order)
    return JSONResponse(msgspec.to_builtins(receipt), 201)


async def total(request: Request) -> Response:
    """``GET /orders/{item}``: whoever only looks does not wait as long."""
    orders: Orders = request.state.orders
    count = await with_options(orders, timeout=3).total(request.path_params["item"])
    return JSONResponse({"total": count})


async def on_call_error(request: Request, error: Exception) -> Response:
    """A call that has failed, in the terms of HTTP."""
    assert isinstance(error, CallError)
    told = {"error": error.message, "code": error.code}
    if isinstance(error, NoLeader | Busy):  # it was not begun
        return JSONResponse(told, 503, {"Retry-After": "1"})
    return JSONResponse(told, 422 if error.code == "nothing-ordered" else 502)


app = Starlette(
    routes=[
        Route("/orders", place, methods=["POST"]),
        Route("/orders/{item}", total),
    ],
    exception_handlers={CallError: on_call_error},
    lifespan=lifespan,
)
