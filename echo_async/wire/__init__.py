"""What bytes mean: framing, limits, faults, identity, PROXY headers, datagrams. No module here does IO.

A reply is the bytes that :mod:`.conversation` returns. Where a :mod:`.script` stands between the conversation and the
transport, it turns them into actions: :mod:`.faults` changes the replies of another script, :mod:`.identity` makes new
ones.
"""
