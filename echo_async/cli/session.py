"""Message after message: send each, show its reply, go on after one that failed."""

from __future__ import annotations

from contextlib import aclosing

from ..client.client import EchoClient
from ..client.stream import Source, flow
from ..errors import ConnectError
from .output import Output

__all__ = ["converse"]


async def converse(client: EchoClient, messages: Source, output: Output) -> bool:
    """Send ``messages`` and show what comes back; return whether all of them came back.

    :exc:`ConnectError` if the server cannot be reached (again) and nothing was lost before.
    """
    everything = True
    async with aclosing(flow(client, messages)) as results:
        try:
            async for batch, start, end, seconds, error in results:
                output.replies(batch.data[start:end], seconds)
                if error is not None:
                    everything = False
                    output.failure(error)
        except ConnectError as error:
            if everything:
                raise
            output.unreachable(error)
    return everything
