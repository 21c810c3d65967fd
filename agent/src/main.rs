//! `mesh-agent`: makes one node do what the cluster's objects say.
#![forbid(unsafe_code)]

mod api;
mod check;
mod cli;
mod join;
mod observe;
mod register;

fn main() {}
