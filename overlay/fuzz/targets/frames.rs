//! What the device hands over, header and packet, cut into segments: lengths stay within the frame.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_overlay::offload::split::split;
use mesh_overlay::offload::vnet::{VNET_HEADER_BYTES, VnetHeader};

fuzz_target!(|input: &[u8]| {
    let Some(vnet) = VnetHeader::read(input) else { return };
    let packet = &input[VNET_HEADER_BYTES..];
    let mut frame = packet.to_vec();
    frame.resize(packet.len() + 15, 0xaa);
    let _ = split((&mut frame, packet.len()), &vnet, 1420, |segment| {
        assert!(segment.len() <= packet.len().next_multiple_of(16));
    });
});
