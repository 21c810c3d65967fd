//! Links may come to carry less than the configuration knew: then the device does too, until they carry more again.
//!
//! A packet that is too big for the underlay is dropped here, and its sender would never learn why. With a smaller MTU on the
//! device, the kernel tells senders by itself.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::mtu::tunnel_mtu;

/// How long a smaller MTU lasts before the link is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// The MTU that is smaller than the configured one; for which endpoint, and when its link was looked at.
#[derive(Debug, Default)]
pub(super) struct Shrink(Option<(u16, SocketAddr, Instant)>);

impl Shrink {
    /// The MTU that the device shall have from now on, when that changes.
    ///
    /// `refused` is an endpoint for which something was too big since the last time; `path_mtu` asks the system what its
    /// link carries.
    pub(super) fn look(
        &mut self,
        now: Instant,
        refused: Option<SocketAddr>,
        configured: u16,
        path_mtu: impl Fn(SocketAddr) -> Option<u16>,
    ) -> Option<u16> {
        let due = |(_, to, since): (u16, SocketAddr, Instant)| {
            (now.saturating_duration_since(since) >= LOOK_AGAIN).then_some(to)
        };
        let to = refused.or_else(|| self.0.and_then(due))?;
        let before = self.0.map_or(configured, |(mtu, ..)| mtu);
        let fits = path_mtu(to).map_or(configured, |path| tunnel_mtu(path, to.ip()));
        self.0 = (fits < configured).then_some((fits, to, now));
        let after = fits.min(configured);
        (after != before).then_some(after)
    }

    /// A new configuration is in force, with its MTU.
    pub(super) fn forget(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_follows_the_link_down_and_up() {
        let start = Instant::now();
        let at = |secs| start + Duration::from_secs(secs);
        let to: SocketAddr = "192.0.2.2:51900".parse().unwrap();
        let mut shrink = Shrink::default();
        assert_eq!(shrink.look(at(0), None, 1420, |_| panic!("nobody asked")), None);
        assert_eq!(shrink.look(at(1), Some(to), 1420, |_| Some(1400)), Some(1340));
        assert_eq!(shrink.look(at(2), Some(to), 1420, |_| Some(1400)), None, "no change");
        assert_eq!(shrink.look(at(3), None, 1420, |_| Some(1500)), None, "not yet");
        assert_eq!(shrink.look(at(7), None, 1420, |_| Some(1500)), Some(1420));
        assert_eq!(shrink.look(at(99), None, 1420, |_| Some(1400)), None, "it is over");
        assert_eq!(shrink.look(at(99), Some(to), 1420, |_| None), None, "nothing is known");
    }
}
