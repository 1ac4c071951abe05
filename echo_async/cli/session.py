"""Message after message: send each, print its reply, continue after one that failed."""

from contextlib import aclosing

from ..awaitable import AwaitableContextManager
from ..client.session import Session
from ..client.stream import Source, send_batches
from ..errors import ConnectError
from .output import Output


async def send_messages(connecting: AwaitableContextManager[Session], messages: Source, output: Output) -> bool:
    """Send ``messages`` and print the replies; return whether all of them matched.

    :exc:`ConnectError` if the server cannot be reached and no reply was lost before.
    """
    all_matched = True
    async with connecting as client, aclosing(send_batches(client, messages)) as results:
        try:
            async for batch, start, end, seconds, error in results:
                output.print_replies(batch.data[start:end], seconds)
                if error is not None:
                    all_matched = False
                    output.print_failure(error)
        except ConnectError as error:
            if all_matched:
                raise
            output.print_connect_error(error)
    return all_matched
