//! IP packets as bytes.

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;
pub(crate) const SYN_ACK: u8 = SYN | ACK;
/// Types of SCTP chunks (RFC 9260, section 3.2).
pub(crate) const DATA: u8 = 0;
pub(crate) const INIT: u8 = 1;
pub(crate) const INIT_ACK: u8 = 2;

/// A TCP segment without data.
pub(crate) struct Segment {
    pub(crate) from: [u8; 4],
    pub(crate) from_port: u16,
    pub(crate) to: [u8; 4],
    pub(crate) to_port: u16,
    pub(crate) flags: u8,
}

pub(crate) fn ipv4(from: [u8; 4], to: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let start = [0x45, 0, length[0], length[1], 0, 0, 0, 0, 64, protocol, 0, 0];
    [&start[..], &from, &to, payload].concat()
}

fn ports(from: u16, to: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (from.to_be_bytes(), to.to_be_bytes());
    [a, b, c, d]
}

fn tcp_header(from: u16, to: u16, flags: u8) -> Vec<u8> {
    [&ports(from, to)[..], &[0; 8], &[0x50, flags], &[0; 6]].concat()
}

pub(crate) fn tcp(segment: &Segment) -> Vec<u8> {
    let header = tcp_header(segment.from_port, segment.to_port, segment.flags);
    ipv4(segment.from, segment.to, 6, &header)
}

/// An SCTP packet with a chunk of that type.
pub(crate) fn sctp(from: ([u8; 4], u16), to: ([u8; 4], u16), chunk: u8) -> Vec<u8> {
    let payload = [&ports(from.1, to.1)[..], &[0; 8], &[chunk, 0, 0, 4]].concat();
    ipv4(from.0, to.0, 132, &payload)
}

/// Any protocol that begins with ports; the beginning of a connection where it tells.
pub(crate) fn with_ports(protocol: u8, from: ([u8; 4], u16), to: ([u8; 4], u16)) -> Vec<u8> {
    let payload = match protocol {
        6 => tcp_header(from.1, to.1, SYN),
        132 => return sctp(from, to, INIT),
        _ => [&ports(from.1, to.1)[..], &[0, 12, 0, 0, 1, 2, 3, 4]].concat(),
    };
    ipv4(from.0, to.0, protocol, &payload)
}

pub(crate) fn udp(from: [u8; 4], from_port: u16, to: [u8; 4], to_port: u16) -> Vec<u8> {
    with_ports(17, (from, from_port), (to, to_port))
}

pub(crate) fn echo(reply: bool, from: [u8; 4], to: [u8; 4], id: u8) -> Vec<u8> {
    ipv4(from, to, 1, &[if reply { 0 } else { 8 }, 0, 0, 0, 0, id, 0, 1])
}

/// "Host unreachable", about the beginning of a packet.
pub(crate) fn icmp_error(from: [u8; 4], to: [u8; 4], about: &[u8]) -> Vec<u8> {
    ipv4(from, to, 1, &[&[3, 1, 0, 0, 0, 0, 0, 0], about].concat())
}

/// A packet that begins a connection; or a fragment of one, with these bits of offset and flag.
pub(crate) fn ipv6(
    from: &str,
    to: &str,
    next: u8,
    from_port: u16,
    to_port: u16,
    fragment: Option<u16>,
) -> Vec<u8> {
    let mut payload = tcp_header(from_port, to_port, SYN);
    let mut first = next;
    if let Some(bits) = fragment {
        let [high, low] = bits.to_be_bytes();
        payload = [&[next, 0, high, low, 0, 0, 0, 1][..], &payload].concat();
        first = 44;
    }
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    let mut packet = vec![0x60, 0, 0, 0, length[0], length[1], first, 64];
    for address in [from, to] {
        packet.extend(address.parse::<std::net::Ipv6Addr>().unwrap().octets());
    }
    packet.extend(payload);
    packet
}
