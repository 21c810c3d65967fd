//! Segmentation and joining of packets, as network cards do it: one system call moves 64 KiB of a flow.
//!
//! Pure: bytes in, bytes out. The rules are those of the Linux stack: `virtio_net_hdr` (virtio 1.3, section 5.1.6),
//! TCP segmentation and GRO.

pub mod checksum;
pub mod coalesce;
pub mod split;
pub mod vnet;
