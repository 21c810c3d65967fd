//! EndpointSlices: which pods a Service means, for those who send traffic to it.

pub(super) mod plan;
