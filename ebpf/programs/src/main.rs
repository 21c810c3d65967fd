//! The eBPF programs of Mesh: socket hooks that translate service addresses, and TC programs that guard and deliver
//! the pods' packets.
//!
//! # Building
//!
//! ```text
//! cd ebpf/programs      # .cargo/config.toml there carries target and flags
//! RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 /usr/bin/cargo build --release --locked --target-dir ../../target/bpf-build
//! cp ../../target/bpf-build/bpfel-unknown-none/release/mesh ../../target/bpf/mesh.bpf.o
//! ```
//!
//! with Debian's `rustc-web cargo-web rust-web-src llvm-22-dev libllvm22` and `bpf-linker` (built with
//! `--no-default-features --features llvm-22`, `LLVM_PREFIX=/usr/lib/llvm-22`) in `PATH`. With rustup instead:
//! `cargo +nightly build --release --locked ...` and neither `RUSTC` nor `RUSTC_BOOTSTRAP`. The LLVM of
//! bpf-linker must not be older than that of the compiler. `RUSTFLAGS` and `CARGO_ENCODED_RUSTFLAGS` must be unset, since they
//! replace the flags of the configuration file.
//!
//! # Rules
//!
//! - A map miss falls through to the node's stack, which has routes for everything; only the anti-spoofing and policy verdicts fail
//!   closed. So the death of the agent changes no verdict.
//! - Addresses are 16 bytes, IPv4 as mapped: one code path.
//! - No loops over packets, no indexing that could panic: small enough for any verifier since Linux 5.10.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

mod atomic;
mod connection;
mod deliver;
mod edge;
mod flow;
mod from_overlay;
mod from_pod;
mod from_uplink;
mod host;
mod kernel_drop;
mod maps;
mod packet;
mod policy;
mod service;
mod sock_addr;
mod sock_ops;
mod to_pod;
mod to_uplink;
mod trace;

use aya_ebpf::macros::{
    cgroup_sock_addr, classifier, raw_tracepoint, sock_ops as sock_ops_program,
};
use aya_ebpf::programs::{RawTracePointContext, SockAddrContext, SockOpsContext, TcContext};
use sock_addr::{V4, V6};

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    sock_addr::connect::<V4>(&ctx)
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    sock_addr::connect::<V6>(&ctx)
}

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    sock_addr::sendmsg::<V4>(&ctx)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    sock_addr::sendmsg::<V6>(&ctx)
}

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    sock_addr::recvmsg::<V4>(&ctx)
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    sock_addr::recvmsg::<V6>(&ctx)
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    sock_addr::getpeername::<V4>(&ctx)
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    sock_addr::getpeername::<V6>(&ctx)
}

#[classifier]
pub fn from_pod(ctx: TcContext) -> i32 {
    from_pod::run(&ctx)
}

#[classifier]
pub fn from_overlay(ctx: TcContext) -> i32 {
    from_overlay::run(&ctx)
}

#[sock_ops_program]
pub fn sock_ops(ctx: SockOpsContext) -> u32 {
    sock_ops::run(&ctx);
    1
}

#[raw_tracepoint(tracepoint = "kfree_skb")]
pub fn kernel_drop(ctx: RawTracePointContext) -> i32 {
    kernel_drop::run(&ctx);
    0
}

#[classifier]
pub fn from_uplink(ctx: TcContext) -> i32 {
    from_uplink::run(&ctx)
}

#[classifier]
pub fn to_uplink(ctx: TcContext) -> i32 {
    to_uplink::run(&ctx)
}

#[classifier]
pub fn to_pod(ctx: TcContext) -> i32 {
    to_pod::run(&ctx)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier rejects a program that can get here.
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
