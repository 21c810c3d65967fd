//! Compiles the interfaces in `proto` without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/cri.proto", "proto/tasks.proto"], ["proto"])?;
    // Credentials must not reach a log through `{:?}`.
    tonic_prost_build::configure()
        .build_server(false)
        .skip_debug(["runtime.v1.AuthConfig", "runtime.v1.PullImageRequest"])
        .compile_fds(descriptors)?;
    Ok(())
}
