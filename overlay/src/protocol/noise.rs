//! WireGuard's messages, handshake and sessions (WG section 5). Keys and ciphers are named below here only.
//!
//! The handshake is Noise_IKpsk2 by `snow`; sessions seal and open with aws-lc. All of it takes `now`, and nothing here
//! knows of peers, endpoints or timers.

pub mod cookie;
pub mod handshake;
pub mod message;
pub mod replay;
pub mod session;
pub mod timestamp;

pub use handshake::{Call, Offer};
pub use message::Message;
pub use session::Session;
pub use timestamp::{Clock, Kept, Stamps, Tai64n};

/// A pre-shared key as the handshake mixes it in; all zeros stand for none (WG section 5.4).
pub type Psk = [u8; 32];
