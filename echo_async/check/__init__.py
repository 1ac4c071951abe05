"""What an echo server, and the path to it, preserve: one small function per check, on sockets with deadlines.

``checks`` has the table of all checks in their order, and runs them. They depend on the echo protocol only; what is
particular to ``identify`` mode is checked where a server has it.
"""
