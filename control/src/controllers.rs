//! The controllers: each turns what was asked for into what is, object by object.

mod availability;
mod deployment;
mod endpoints;
mod replicaset;
