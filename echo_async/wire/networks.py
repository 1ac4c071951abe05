"""Lists of addresses and networks, without IO: whose PROXY headers and datagrams are accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipaddress import IPv4Network, IPv6Network


class Networks:
    """Addresses and networks, separated by commas; ``*`` is every address. :exc:`ValueError` if an entry is invalid."""

    def __init__(self, text: str) -> None:
        from ipaddress import ip_network  # imported only where it is used: it takes some milliseconds

        entries = [entry.strip() for entry in text.split(",")]
        self._has_all = "*" in entries
        self._networks: list[IPv4Network | IPv6Network] = [ip_network(entry) for entry in entries if entry != "*"]

    def __contains__(self, peername: object) -> bool:
        """Whether a socket address is listed. Unix peers always are: the file permissions protect the socket."""
        from ipaddress import IPv6Address, ip_address

        if self._has_all or not isinstance(peername, tuple):
            return True
        address = ip_address(peername[0].partition("%")[0])
        if isinstance(address, IPv6Address) and address.ipv4_mapped:  # an IPv4 peer of a dual-stack socket
            address = address.ipv4_mapped
        return any(address in network for network in self._networks)
