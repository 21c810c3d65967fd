//! The queues of one lane. There are several, so that flows that send much do not keep the others waiting: the kernel
//! spreads flows over them, and they are read in turns. It is fair queueing by hash (RFC 8290, section 4.1, without the
//! control of delay), with the rings of the device as its queues: no packet is touched once more for it.

use std::ops::RangeInclusive;

use crate::os::tun::Queue;

/// Queues of a lane: so many flows that send much, at least, before one that sends little shares a queue with one of them.
pub(super) const EACH: usize = 8;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// The queues of lane `lane` of so many.
pub(super) fn of(all: &[Queue], lane: usize, lanes: usize) -> Vec<&Queue> {
    all.iter().skip(lane).step_by(lanes.max(1)).collect()
}

/// Where a packet of that flow is written. The kernel remembers it, and puts the answers there.
pub(super) fn choose<'q>(queues: &[&'q Queue], packet: &[u8]) -> &'q Queue {
    queues[flow(packet) as usize % queues.len()]
}

/// A number that all packets of a flow have.
fn flow(packet: &[u8]) -> u32 {
    let Some((addresses, ports)) = places(packet) else { return 0 };
    let bytes = |range: RangeInclusive<usize>| packet.get(range).unwrap_or_default();
    let words = bytes(addresses).chunks(4).chain(ports.map(bytes));
    // A product's upper bits depend on all bits of its factors: they are what the next word meets, and what counts.
    let mixed = words.fold(0u64, |mixed, word| {
        let word = word.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
        (mixed ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32)
    });
    mixed as u32
}

/// Where the addresses are, and the ports where there are any.
fn places(packet: &[u8]) -> Option<(RangeInclusive<usize>, Option<RangeInclusive<usize>>)> {
    let has_ports = |protocol: u8| protocol == TCP || protocol == UDP;
    match packet.first()? >> 4 {
        4 => {
            let header = usize::from(packet[0] & 15) * 4;
            let whole = packet.get(6..8)?.iter().zip([0x3f, 0xff]).all(|(b, mask)| b & mask == 0);
            let ports = (whole && has_ports(*packet.get(9)?)).then_some(header..=header + 3);
            Some((12..=19, ports))
        }
        6 => Some((8..=39, has_ports(*packet.get(6)?).then_some(40..=43))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn v4(host: u8, port: u8) -> Vec<u8> {
        let mut packet =
            vec![0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, TCP, 0, 0, 10, 0, 0, host, 10, 0, 1, 1];
        packet.extend([0, port, 0x1f, 0x90]);
        packet
    }

    fn v6(host: u8, port: u8) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 20, UDP, 64];
        packet.extend([0xfd; 15]);
        packet.push(host);
        packet.extend([0xfe; 16]);
        packet.extend([0, port, 0x1f, 0x90]);
        packet
    }

    #[test]
    fn a_flow_has_one_number_and_flows_have_many() {
        for make in [v4, v6] {
            let mut later = make(7, 1);
            later.extend([1, 2, 3]);
            later[5] ^= 0x55; // another length, and in IPv4 another identification
            assert_eq!(flow(&make(7, 1)), flow(&later));
            let by_port = (0..64).map(|n| flow(&make(7, n)) % 8).collect::<BTreeSet<_>>();
            let by_host = (0..64).map(|n| flow(&make(n, 1)) % 8).collect::<BTreeSet<_>>();
            assert_eq!((by_port.len(), by_host.len()), (8, 8), "64 flows leave no queue empty");
        }
    }

    #[test]
    fn pieces_of_packets_have_no_ports_and_rubbish_has_a_queue() {
        let mut first = v4(7, 1);
        first[6] = 0x20;
        let mut second = v4(7, 2);
        second[7] = 100;
        assert_eq!(flow(&first), flow(&second));
        for length in 0..v6(1, 1).len() {
            flow(&v6(1, 1)[..length]);
            flow(&v4(1, 1)[..length.min(24)]);
        }
        assert_eq!((flow(&[]), flow(&[0xff; 60])), (0, 0));
    }
}
