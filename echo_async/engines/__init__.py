"""How bytes are carried: three engines over one conversation, twins in shape and names.

``streams``   a coroutine a client: reads ``chunk_size`` bytes at a time from an asyncio stream
``protocol``  callbacks on asyncio's transports: no task a client, one write a read, for throughput
``threads``   a thread a client, blocking reads of ``chunk_size`` bytes: the project's first model

Each has a :class:`~echo_async.engines.connection.Connection` of its own kind. What does not depend on
the engine (who is connected, the limits, time, the log, the counters) is in ``connection`` and ``registry``.
"""
