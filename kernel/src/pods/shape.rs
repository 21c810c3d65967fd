//! A pod's bandwidth: a token bucket at either end of its pair, where packets leave.
//!
//! What goes to the pod is limited on the node's end. What it sends is limited on its own end, before anything of the node sees the
//! packet: the root of the namespace (`CAP_NET_ADMIN` inside) could take that away, nobody else can.

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};

use crate::netlink::Request;
use crate::netlink::message::RouteRequest;

/// At most so much a second, on average.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Bits per second.
    pub bits_per_sec: u64,
    /// How much may go at once, in bits. Too much would be no limit and too little no traffic, so bounds apply.
    pub burst_bits: Option<u64>,
}

/// Limits of a pod's interface.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// What the pod receives.
    pub to_pod: Option<Rate>,
    /// What the pod sends.
    pub from_pod: Option<Rate>,
}

/// Some packets of the largest kind.
const LEAST_BURST: u64 = 16 << 10;
/// A packet that is handed over in one piece has up to 64 KiB; whoever waits has to fit.
const LEAST_QUEUE: u64 = 128 << 10;
const MOST: u64 = 1 << 30;

impl Rate {
    fn bytes_per_sec(self) -> u64 {
        (self.bits_per_sec / 8).max(1)
    }

    /// Ten milliseconds' worth unless asked for; at most 100 ms, because some runtimes ask for 4 Gbit.
    fn burst_bytes(self) -> u64 {
        let rate = self.bytes_per_sec();
        let asked = self.burst_bits.map_or(rate / 100, |bits| bits / 8);
        asked.min(rate / 10).clamp(LEAST_BURST, MOST)
    }

    /// What waits longer than 50 ms is dropped: senders slow down by that.
    fn queue_bytes(self) -> u64 {
        let queue = (self.bytes_per_sec() / 20).max(LEAST_QUEUE);
        (self.burst_bytes() + queue).min(2 * MOST)
    }

    /// Puts a token bucket on a device, in the place of what is there.
    pub(super) fn request(self, ifindex: u32) -> RouteRequest {
        let mut message = TcMessage::with_index(ifindex.cast_signed());
        message.header.parent = TcHandle { major: 0xffff, minor: 0xffff };
        message.header.handle = TcHandle { major: 1, minor: 0 };
        message.attributes.push(TcAttribute::Kind("tbf".to_owned()));
        let option = |kind, value| TcOption::Other(DefaultNla::new(kind, value));
        message.attributes.push(TcAttribute::Options(vec![
            option(TCA_TBF_PARMS, self.parameters()),
            option(TCA_TBF_RATE64, self.bytes_per_sec().to_ne_bytes().to_vec()),
            option(TCA_TBF_BURST, low(self.burst_bytes()).to_ne_bytes().to_vec()),
        ]));
        Request {
            message: RouteNetlinkMessage::NewQueueDiscipline(message),
            flags: NLM_F_CREATE | NLM_F_REPLACE,
        }
    }

    /// `struct tc_tbf_qopt` of `linux/pkt_sched.h`: two `tc_ratespec`, then limit, buffer and mtu.
    fn parameters(self) -> Vec<u8> {
        // Cell log, link layer, overhead (16 bits), cell alignment (16), smallest packet (16), rate (32).
        let mut bytes = vec![0, TC_LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0];
        bytes.extend(low(self.bytes_per_sec()).to_ne_bytes());
        bytes.extend([0; 12]);
        for word in [low(self.queue_bytes()), 0, 0] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes
    }
}

const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
const TC_LINKLAYER_ETHERNET: u8 = 1;

fn low(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_are_neither_endless_nor_too_small_for_a_packet() {
        let rate = |bits_per_sec, burst_bits| Rate { bits_per_sec, burst_bits };
        // What containerd sends for the annotations.
        let endless = rate(10_000_000, Some(u64::from(u32::MAX)));
        assert_eq!(endless.burst_bytes(), 125_000);
        assert_eq!(rate(10_000_000, Some(400_000)).burst_bytes(), 50_000);
        assert_eq!(rate(1000, Some(8)).burst_bytes(), LEAST_BURST);
        assert_eq!(rate(10_000_000_000, None).burst_bytes(), 12_500_000);
        assert_eq!(rate(0, None).bytes_per_sec(), 1);
        assert_eq!(rate(u64::MAX, Some(u64::MAX)).burst_bytes(), MOST);
        assert_eq!(endless.parameters().len(), 36);
    }
}
