//! `mesh-agent`: makes one node do what the cluster's objects say.
//!
//! Owns: joining and registration ([`join`](self), `renewal`, `register`), observation (`observe`), one reconciler per concern
//! (`reconcile`), the CNI server ([`cni`]), the pods of the node (`pods`), the worker processes (`workers`), and what
//! the node tells about itself (`server`, `check`, `encryption`), the replacement of its key (`rotation`), the paths to the other nodes (`paths`), and
//! when a pod that is deleted may end ([`drain`]).
//!
//! Never does: touch a packet. It may be killed at any moment; traffic, names and ingress go on, and the next agent
//! finds everything where this one left it: links and maps on the bpffs, interfaces by their mark, workers by their
//! identity files, addresses in the journal, the last snapshot on disk.
//!
//! Entry: [`main`].
#![forbid(unsafe_code)]

mod announce;
mod api;
mod board;
mod capacity;
mod check;
mod cli;
pub mod cni;
mod credential;
mod differences;
pub mod drain;
mod encryption;
mod errors;
mod files;
mod flows;
mod join;
mod link;
mod listen;
mod memory;
mod observe;
mod originals;
mod paths;
pub mod pods;
mod preshared;
mod readiness;
mod reconcile;
mod register;
mod renewal;
mod reset;
mod rotation;
mod run;
mod saved;
mod server;
mod settings;
mod sockets;
mod start;
mod switch;
mod trace;
mod workers;

pub use start::main;
