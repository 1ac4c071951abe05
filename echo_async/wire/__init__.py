"""What bytes mean: framing, limits, faults, identity, PROXY headers, datagrams. No module here does IO."""
