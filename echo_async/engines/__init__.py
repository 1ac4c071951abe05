"""How bytes are carried: three engines over one conversation, the same in shape and names.

``streams``   one coroutine per connection: reads ``chunk_size`` bytes at a time from an asyncio stream
``protocol``  callbacks on asyncio's transports: no task per connection, one write per read, for throughput
``threads``   one thread per connection, blocking reads of ``chunk_size`` bytes: the project's first model

Each has a class of its own derived from :class:`~echo_async.engines.connection.Connection`. ``acceptor`` accepts
and ends connections for the first two, ``thread_acceptor`` for the third. What does not depend on the engine:
``context`` (what connections share), ``registry`` (which are open), ``admission`` (which are established).
"""
