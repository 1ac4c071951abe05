"""The server in a program: who is accepted, counted and drained. ``python -m echo_async.server`` for people."""
