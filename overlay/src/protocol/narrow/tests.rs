use proptest::prelude::*;

use super::*;

fn v4(payload: usize, flags: u16, protocol: u8) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0x12, 0x34, 0, 0, 64, protocol, 0, 0];
    packet[2..4].copy_from_slice(&((20 + payload) as u16).to_be_bytes());
    packet[6..8].copy_from_slice(&flags.to_be_bytes());
    packet.extend([10, 71, 0, 2, 10, 72, 0, 2]);
    let sum = checksum::finish(checksum::add(0, &packet));
    packet[10..12].copy_from_slice(&sum);
    packet.extend((0..payload).map(|n| n as u8));
    packet
}

fn v6(payload: usize, next: u8) -> Vec<u8> {
    let mut packet = vec![0; 40 + payload];
    packet[0] = 0x60;
    packet[4..6].copy_from_slice(&(payload as u16).to_be_bytes());
    packet[6] = next;
    packet[8..10].copy_from_slice(&[0xfd, 0x71]);
    packet[24..26].copy_from_slice(&[0xfd, 0x72]);
    packet
}

/// A TCP packet with these options and a right checksum.
fn segment(v6_: bool, flags: u8, options: &[u8]) -> Vec<u8> {
    let payload = 20 + options.len();
    let mut packet = if v6_ { v6(payload, TCP) } else { v4(payload, 0x4000, TCP) };
    let at = if v6_ { 40 } else { 20 };
    packet[at..].fill(7);
    packet[at + 12] = ((payload / 4) << 4) as u8;
    packet[at + 13] = flags;
    packet[at + 20..].copy_from_slice(options);
    packet[at + 16..at + 18].fill(0);
    let sum = tcp_sum(&packet, at);
    packet[at + 16..at + 18].copy_from_slice(&checksum::finish(sum));
    packet
}

fn tcp_sum(packet: &[u8], at: usize) -> checksum::Sum {
    let pseudo = checksum::add_be(checksum::pseudo_header(packet, TCP), (packet.len() - at) as u16);
    checksum::add(pseudo, &packet[at..])
}

proptest! {
    #[test]
    fn an_offer_is_lowered_wherever_it_stands_and_the_checksum_stays_right(
        is_v6 in any::<bool>(), before in 0usize..4, offered in any::<u16>(), mtu in 1280u16..1420,
    ) {
        let mut options = vec![OPTION_NOP; before];
        options.extend([OPTION_MSS, 4]);
        options.extend(offered.to_be_bytes());
        options.resize(8, OPTION_NOP);
        let mut packet = segment(is_v6, SYN, &options);
        let at = if is_v6 { 40 } else { 20 };
        clamp_segments(&mut packet, false, mtu);
        prop_assert!(checksum::is_intact(tcp_sum(&packet, at)));
        let place = at + 20 + before + 2;
        let now = u16::from_be_bytes([packet[place], packet[place + 1]]);
        prop_assert_eq!(now, offered.min(mtu - at as u16 - 20));
    }

    #[test]
    fn nothing_is_read_beyond_the_end(noise in prop::collection::vec(any::<u8>(), 0..80), version in 0u8..2) {
        let mut packet = noise;
        if let Some(first) = packet.first_mut() {
            *first = if version == 0 { 0x45 } else { 0x60 };
        }
        for protocol in [TCP, ICMP, ICMPV6] {
            if packet.len() >= 20 {
                packet[if version == 0 { 9 } else { 6 }] = protocol;
                cut(&packet, 1280, |_| {});
            }
            clamp_segments(&mut packet, true, 1280);
            let _ = too_big(&packet, 1280, "10.72.0.1".parse().unwrap());
            let _ = too_big(&packet, 1280, "fd72::1".parse().unwrap());
        }
    }

    #[test]
    fn pieces_join_to_what_was_cut(payload in 1usize..4000, mtu in 68u16..1500, more in any::<bool>(), offset in 0u16..100) {
        let flags = offset | if more { 0x2000 } else { 0 };
        let packet = v4(payload, flags, 17);
        let (mut joined, mut last): (Vec<u8>, _) = (vec![], None);
        let may = cut(&packet, mtu, |piece| {
            assert!(piece.len() <= usize::from(mtu));
            assert!(checksum::is_intact(checksum::add(0, &piece[..20])));
            assert_eq!(usize::from(u16::from_be_bytes([piece[2], piece[3]])), piece.len());
            let flags = u16::from_be_bytes([piece[6], piece[7]]);
            assert_eq!(usize::from(flags & 0x1fff), usize::from(offset) + joined.len() / 8);
            joined.extend(&piece[20..]);
            last = Some(flags & 0x2000 != 0);
        });
        prop_assert!(may);
        prop_assert_eq!(&joined[..], &packet[20..]);
        prop_assert_eq!(last, Some(more), "only the very last piece ends the packet");
    }
}

#[test]
fn only_the_start_of_a_connection_is_touched() {
    let offer = [OPTION_MSS, 4, 0x05, 0xb4];
    for packet in [
        segment(false, 0x10, &offer),
        segment(false, SYN, &[OPTION_END, OPTION_MSS, 4, 0xff]),
        segment(true, SYN, &[OPTION_MSS, 2, 4, 4]),
        segment(true, SYN, &[8, 0, 0, 0]),
    ] {
        let mut same = packet.clone();
        clamp_segments(&mut same, false, 1280);
        assert_eq!(same, packet);
    }
    let mut partial = segment(false, SYN, &offer);
    let sum = partial[36..38].to_vec();
    clamp_segments(&mut partial, true, 1340);
    assert_eq!((&partial[36..38], &partial[42..44]), (&sum[..], &1300u16.to_be_bytes()[..]));
}

#[test]
fn what_may_not_be_cut_is_not() {
    assert!(!cut(&v4(2000, 0x4000, 17), 1280, |_| panic!("cut")));
    assert!(!cut(&v6(2000, 17), 1280, |_| panic!("cut")));
}

#[test]
fn the_sender_is_told_the_size_that_fits_and_nobody_else_is() {
    let router4: IpAddr = "10.72.0.1".parse().unwrap();
    let packet = v4(1400, 0x4000, 17);
    let message = too_big(&packet, 1340, router4).unwrap();
    assert_eq!(message.len(), 576);
    assert!(checksum::is_intact(checksum::add(0, &message[..20])));
    assert!(checksum::is_intact(checksum::add(0, &message[20..])));
    assert_eq!((&message[12..16], &message[16..20]), (&[10, 72, 0, 1][..], &packet[12..16]));
    assert_eq!((&message[20..22], &message[26..28]), (&[3, 4][..], &1340u16.to_be_bytes()[..]));
    assert_eq!(message[28..], packet[..548]);

    let router6: IpAddr = "fd72::1".parse().unwrap();
    let packet = v6(1400, 17);
    let message = too_big(&packet, 1340, router6).unwrap();
    assert_eq!(message.len(), 1280);
    let pseudo = checksum::add_be(checksum::pseudo_header(&message, ICMPV6), 1240);
    assert!(checksum::is_intact(checksum::add(pseudo, &message[40..])));
    assert_eq!((message[40], &message[44..48]), (2, &1340u32.to_be_bytes()[..]));
    assert_eq!(message[24..40], packet[8..24]);

    let mut error = v4(1400, 0x4000, ICMP);
    error[20] = 3;
    assert_eq!(too_big(&error, 1340, router4), None, "about an error");
    error[20] = 8;
    assert!(too_big(&error, 1340, router4).is_some(), "about an echo");
    assert_eq!(too_big(&v4(1400, 0x4005, 17), 1340, router4), None, "about a later fragment");
    let mut error = v6(1400, ICMPV6);
    error[40] = 1;
    assert_eq!(too_big(&error, 1340, router6), None);
    assert_eq!(too_big(&packet, 1340, router4), None, "of the other family");
}
