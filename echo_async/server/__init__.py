"""The server: accepts, counts and drains connections. ``python -m echo_async.server`` runs it as a process."""
