//! Puts the eBPF object into the crate: `MESH_BPF_OBJECT`, else `target/bpf/mesh.bpf.o`, else nothing.

use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-env-changed=MESH_BPF_OBJECT");
    println!("cargo:rerun-if-env-changed=CARGO_TARGET_DIR");
    let manifest = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("set by cargo")).join("mesh.bpf.o");
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let default = target.unwrap_or_else(|| manifest.join("../target")).join("bpf/mesh.bpf.o");
    let object = std::env::var_os("MESH_BPF_OBJECT").map_or(default, PathBuf::from);
    // A missing file counts as changed, so the object is picked up as soon as it is built.
    println!("cargo:rerun-if-changed={}", object.display());
    let bytes = read(&object);
    std::fs::write(&out, bytes).expect("OUT_DIR is writable");
}

fn read(object: &Path) -> Vec<u8> {
    std::fs::read(object).unwrap_or_else(|error| {
        println!(
            "cargo:warning=no eBPF object at {} ({error}): this build cannot load programs; run `cargo xtask build-ebpf`",
            object.display()
        );
        Vec::new()
    })
}
