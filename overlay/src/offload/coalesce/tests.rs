use std::cell::RefCell;

use proptest::prelude::*;

use super::*;
use crate::offload::split::split;
use crate::offload::vnet::VNET_HEADER_BYTES;

/// Keeps what is written.
#[derive(Default)]
struct Kept {
    writes: RefCell<Vec<Vec<u8>>>,
}

impl Device for &Kept {
    fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        let bytes = pieces.iter().flat_map(|piece| piece.iter().copied()).collect();
        self.writes.borrow_mut().push(bytes);
        Ok(())
    }

    fn takes_udp_trains(&self) -> bool {
        true
    }

    fn refused(&self, _: usize, error: &io::Error) {
        panic!("{error}");
    }
}

/// A packet of a flow, checksums complete.
#[derive(Debug, Clone)]
struct Packet {
    v4: bool,
    tcp: bool,
    port: u16,
    sequence: u32,
    flags: u8,
    payload: Vec<u8>,
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let transport_bytes = if self.tcp { 32 } else { 8 } + self.payload.len();
        let mut bytes = if self.v4 {
            let mut ip =
                vec![0x45, 0, 0, 0, 0, 7, 0x40, 0, 64, if self.tcp { 6 } else { 17 }, 0, 0];
            ip.extend([10, 244, 1, 2, 10, 244, 2, 3]);
            ip[2..4].copy_from_slice(&((20 + transport_bytes) as u16).to_be_bytes());
            let sum = checksum::finish(checksum::add(0, &ip));
            ip[10..12].copy_from_slice(&sum);
            ip
        } else {
            let mut ip = vec![0x60, 0, 0, 0, 0, 0, if self.tcp { 6 } else { 17 }, 64];
            ip.extend([0xfd; 16]);
            ip.extend([0xfe; 16]);
            ip[4..6].copy_from_slice(&(transport_bytes as u16).to_be_bytes());
            ip
        };
        let transport = bytes.len();
        bytes.extend(self.port.to_be_bytes());
        bytes.extend(80u16.to_be_bytes());
        if self.tcp {
            bytes.extend(self.sequence.to_be_bytes());
            bytes.extend([0, 0, 0, 9, 0x80, self.flags, 1, 0, 0, 0, 0, 0]);
            bytes.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
        } else {
            bytes.extend((transport_bytes as u16).to_be_bytes());
            bytes.extend([0, 0]);
        }
        bytes.extend(&self.payload);
        let place = transport + if self.tcp { 16 } else { 6 };
        let pseudo = checksum::pseudo_header(&bytes, if self.tcp { 6 } else { 17 });
        let sum =
            checksum::add(checksum::add_be(pseudo, transport_bytes as u16), &bytes[transport..]);
        let mut sum = checksum::finish(sum);
        if !self.tcp && sum == [0, 0] {
            sum = [0xff, 0xff];
        }
        bytes[place..place + 2].copy_from_slice(&sum);
        bytes
    }
}

fn tcp(sequence: u32, flags: u8, payload: usize) -> Packet {
    Packet {
        v4: true,
        tcp: true,
        port: 4000,
        sequence,
        flags,
        payload: vec![sequence as u8; payload],
    }
}

fn join(packets: &[Vec<u8>]) -> Vec<(VnetHeader, Vec<u8>)> {
    let kept = Kept::default();
    let mut coalescer = Coalescer::new(&kept, 64 << 10);
    for packet in packets {
        coalescer.room(packet.len() + 48)[..packet.len()].copy_from_slice(packet);
        coalescer.accept(packet.len());
    }
    coalescer.flush();
    let writes = kept.writes.take();
    let read = |w: Vec<u8>| (VnetHeader::read(&w).unwrap(), w[VNET_HEADER_BYTES..].to_vec());
    writes.into_iter().map(read).collect()
}

/// What the receiving stack makes of a write.
fn cut(vnet: &VnetHeader, train: &[u8]) -> Vec<Vec<u8>> {
    let mut frame = train.to_vec();
    frame.extend([0xaa; 15]);
    let mut packets = Vec::new();
    split((&mut frame, train.len()), vnet, 0, |packet| packets.push(packet.to_vec())).unwrap();
    packets
}

#[test]
fn a_bulk_flow_becomes_one_train() {
    let mut packets: Vec<_> = (0..10).map(|n| tcp(n * 1000, 0x10, 1000).bytes()).collect();
    packets.push(tcp(10_000, 0x18, 400).bytes());
    let writes = join(&packets);
    assert_eq!(writes.len(), 1);
    let (vnet, train) = &writes[0];
    assert_eq!((vnet.gso, vnet.gso_bytes, train.len()), (Gso::TcpV4, 1000, 52 + 10_400));
    assert_eq!(train[20 + 13], 0x18, "the final PSH is kept");
}

#[test]
fn what_breaks_a_train() {
    let next = |flags, payload| tcp(1000, flags, payload);
    let mut corrupt = next(0x10, 1000).bytes();
    *corrupt.last_mut().unwrap() ^= 1;
    let mut other_window = next(0x10, 1000);
    other_window.sequence = 1000;
    let mut other_window = other_window.bytes();
    other_window[20 + 15] ^= 1;
    let gap = tcp(2000, 0x10, 1000).bytes();
    let other_flow = Packet { port: 4001, ..next(0x10, 1000) }.bytes();
    let cases = [
        ("FIN", next(0x11, 1000).bytes()),
        ("RST", next(0x14, 1000).bytes()),
        ("larger payload", next(0x10, 1001).bytes()),
        ("no payload", next(0x10, 0).bytes()),
        ("wrong checksum", corrupt),
        ("window", other_window),
        ("gap", gap),
        ("other flow", other_flow),
    ];
    for (why, packet) in cases {
        let writes = join(&[tcp(0, 0x10, 1000).bytes(), packet.clone()]);
        assert_eq!(writes.len(), 2, "{why}");
        assert_eq!(writes[1], (VnetHeader::default(), packet), "{why}: passed on as it came");
    }
}

#[test]
fn a_broken_first_packet_is_not_blessed() {
    let mut corrupt = tcp(0, 0x10, 1000).bytes();
    corrupt[60] ^= 1;
    let writes = join(&[corrupt.clone(), tcp(1000, 0x10, 1000).bytes()]);
    assert_eq!(writes[0], (VnetHeader::default(), corrupt));
    assert_eq!(writes.len(), 2);
}

#[test]
fn oddities_pass_as_they_are() {
    let mut fragment = tcp(0, 0x10, 100).bytes();
    fragment[6] = 0x20;
    let mut options = tcp(0, 0x10, 100).bytes();
    options[0] = 0x46;
    let mut offset = tcp(0, 0x10, 100).bytes();
    offset[20 + 12] = 0xf0;
    offset.truncate(60);
    let icmp = {
        let mut icmp = tcp(0, 0x10, 100).bytes();
        icmp[9] = 1;
        icmp
    };
    for packet in [fragment, options, offset, icmp, vec![0x45; 20], vec![0x60; 40]] {
        let writes = join(&[packet.clone(), packet.clone()]);
        assert_eq!(writes, vec![(VnetHeader::default(), packet); 2]);
    }
}

fn packets() -> impl Strategy<Value = Vec<Packet>> {
    // Few ports, sizes and sequences, so that packets meet.
    let one = (any::<bool>(), any::<bool>(), 0u16..2, 0u32..6, 0u8..10, 0usize..3, any::<u8>());
    let one = one.prop_map(|(v4, tcp, port, step, flags, size, fill)| Packet {
        v4,
        tcp,
        port,
        sequence: (u32::MAX - 2000).wrapping_add(step * 1000),
        flags: if flags == 0 { 0x18 } else { 0x10 },
        payload: vec![fill; [1000, 1000, 333][size]],
    });
    prop::collection::vec(one, 0..80)
}

proptest! {
    #[test]
    fn cutting_gives_back_each_flow_in_order(packets in packets(), in_sequence in any::<bool>()) {
        let mut next = std::collections::HashMap::new();
        let sent: Vec<_> = packets.into_iter().map(|mut packet| {
            if in_sequence {
                let sequence = next.entry((packet.v4, packet.port)).or_insert(u32::MAX - 3000);
                packet.sequence = *sequence;
                if packet.tcp {
                    *sequence = sequence.wrapping_add(packet.payload.len() as u32);
                }
            }
            packet
        }).collect();
        let bytes: Vec<_> = sent.iter().map(Packet::bytes).collect();
        let received: Vec<_> =
            join(&bytes).iter().flat_map(|(vnet, train)| cut(vnet, train)).collect();
        let flow = |packet: &[u8]| {
            let v4 = packet[0] == 0x45;
            let (protocol, transport) = if v4 { (packet[9], 20) } else { (packet[6], 40) };
            (v4, protocol, packet[transport..transport + 2].to_vec())
        };
        // The identification of a packet that may not be fragmented means nothing (RFC 6864); trains count it up.
        let plain = |packet: &[u8]| {
            let mut packet = packet.to_vec();
            if packet[0] == 0x45 {
                packet[4..6].fill(0);
                packet[10..12].fill(0);
            }
            packet
        };
        let by_flow = |packets: &[Vec<u8>]| {
            let mut flows = std::collections::BTreeMap::<_, Vec<_>>::new();
            for packet in packets {
                flows.entry(flow(packet)).or_default().push(plain(packet));
            }
            flows
        };
        prop_assert_eq!(by_flow(&received), by_flow(&bytes));
    }

    #[test]
    fn arbitrary_bytes_pass_unharmed(
        packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 20..120), 1..20),
    ) {
        let bytes: usize = packets.iter().map(Vec::len).sum();
        let written: usize = join(&packets).iter().map(|(_, train)| train.len()).sum();
        prop_assert!(written <= bytes);
    }
}
