"""A server as a process: workers, metrics, systemd, signals."""
