// Package egress opens connections to addresses that somebody outside chose:
// the URLs of webhook endpoints.
//
// A URL is checked when it is registered ([Policy.CheckURL]) and every address
// again when it is dialled ([Dialer.DialContext]): the host's name is resolved
// once, each address it stands for is judged, and the connection goes to the
// judged address and no other, so a name that answers differently the second
// time (DNS rebinding) gains nothing. Loopback, private, link-local, shared,
// multicast, unspecified and documentation addresses are refused, and with them
// the metadata services of the clouds, in IPv4 and in every form in which IPv6
// embeds IPv4 (mapped, compatible, NAT64, 6to4, Teredo): IPv6 outside the
// global unicast range, and special ranges within it, are never dialled.
//
// The ranges are those of IANA's registries of special-purpose addresses
// (RFC 6890), as the library code.dny.dev/ssrf keeps them.
//
// Networks that an operator allows ([Policy.Allow]) are exempt, ports
// included; nothing is by default, in development neither.
package egress
