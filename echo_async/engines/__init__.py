"""How bytes are carried: three engines over one conversation, the same in shape and names.

``streams``   one coroutine per connection: reads ``chunk_size`` bytes at a time from an asyncio stream
``protocol``  callbacks on asyncio's transports: no task per connection, one write per read, for throughput
``threads``   one thread per connection, blocking reads of ``chunk_size`` bytes: the project's first model

Each has one class derived from :class:`~echo_async.engines.connection.Connection`. What else a connection has are
objects that it holds: its conversation, its timeouts, and a runner if it has a script.

How each of them ends, by the same names everywhere::

    name                      called by                      answered               sent      the peer sees
    Conversation.end_input    engine, at the end of input;   nothing more           -         -
                              script; Connection.linger
    Conversation.drain        Connection.drain               the message that has   -         -
                                                             begun
    Connection.linger         sweep, at a timeout; script,   nothing more           all       FIN, later a close
                              after its time
    Connection.drain          sweep, during a shutdown;      all that was received  all       FIN, later a close
                              Connection.linger
    Connection.abort          sweep, after a write timeout   nothing more           nothing   RST, or FIN if nothing
                              or a lingering one; shutdown,                         more      was left to send;
                              after its timeout; script;                                      RST if ``reset`` is true
                              disconnect

``linger`` discards input until the client closes its side: closing with unread input would send a reset, which can
overtake the last reply (RFC 1122 section 4.2.2.13). ``drain`` does so as well once all is answered, and an engine after
the last message.
"""
