"""The other side: send messages, get them back, and know that what came back is what was sent.

``echo_client``  the client, and when it connects again
``connection``   one connection: what was sent must come back
``stream``       many messages in a bounded window
``target``       where to connect, and how
``messages`` ``tls``   what a message is; the context of the TLS options

The command: ``command`` (options in, an exit code out), ``conversing`` (message after message),
``pinging`` (one message again and again), ``stdin``, ``output`` and ``interrupts``.
"""

from .client import EchoClient, connect, echo

__all__ = ["EchoClient", "connect", "echo"]
