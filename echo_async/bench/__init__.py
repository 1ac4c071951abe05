"""The load generator and the comparison of servers.

``pattern``       the bytes that are sent, and the comparison of replies with them
``plan``          the validated options of one load
``connection``    one connection: connects, sends, receives, compares
``sockets``       its sockets
``schedule``      the times at which messages are sent: closed or open loop
``recorder``      the samples and failures of one process
``generator``     the load of one process
``worker``        that process, as its parent starts it
``load``          all processes of one load
``result``        the merged result of one load
``distribution``  percentiles
``expectation``   conditions such as ``p99<5ms``
``server``        the server process that is measured
``comparison``    servers side by side, in interleaved rounds
``machine``       the machine on which a benchmark ran
``report``        tables, JSON, progress bar
``plot``          pictures

No other package imports this one, except :mod:`echo_async.cli.bench`. numpy, rich and matplotlib (``pip install
'echo-async[bench]'``) are imported where they are used; the load generator processes need none of them.
"""
