"""The load generator, and the comparison of servers that uses it.

numpy, rich and matplotlib (``pip install 'echo-async[bench]'``) are imported where they are used; the load generator
processes need none of them.
"""
