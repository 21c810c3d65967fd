//! Clients outside and services inside, on two nodes.
//!
//! ```text
//!   client 192.0.2.2 -- up0 (TC) -- node 1 -- (TC) mesh-wg ==TUN, copied by this test== mesh-wg (TC) -- node 2
//!          2001:db8::2            192.0.2.1      10.244.1.1                        10.244.2.1
//!                                    |                                                |
//!                                pod 10.244.1.5                                   pod 10.244.2.5
//! ```

mod access;
mod collision;
mod errors;
mod golden;
mod gone;
mod host;
mod loopback;
mod memory;
mod neighbours;
mod probe;
mod reach;
mod sctp;
mod strangers;
mod versions;
mod world;

use crate::lab::at;
use world::*;
