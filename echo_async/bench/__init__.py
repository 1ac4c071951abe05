"""The measuring stick: how much an echo server carries, how long it takes, and whether every byte is right.

``pattern``      what is sent, and how a reply that differs is found
``plan``         what one load does: the options, checked
``connection``   one connection: opened, filled, read, compared
``schedule``     when messages are sent: closed loop or open loop
``generator``    one process of load: sockets, a clock, samples
``worker``       that process, as its parent runs it
``load``         all of the processes of one load, and what they found together
``distribution``      samples in, percentiles out
``expectation``  ``p99<5ms``: what has to hold
``server``       a server in a process of its own, for as long as it is measured
``comparison``    servers side by side, in interleaved rounds
``machine``      what the figures were taken on
``report`` ``plot`` ``command``   tables, pictures, options

Nothing here is imported by the rest of the package. numpy, rich and matplotlib (``pip install
'echo-async[bench]'``) are imported where they are used; the processes that make the load need none of them.
"""
