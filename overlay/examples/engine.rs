//! The overlay worker alone, for tests and measurements: `engine SOCKET STATE DEVICE KEYFILE [GENERATION]`.
//!
//! The generation means nothing: with another one, it is another command line, and the worker is replaced.

use std::process::ExitCode;

use mesh_overlay::WorkerOptions;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let ([socket, state, device, private_key] | [socket, state, device, private_key, _]) =
        arguments.as_slice()
    else {
        eprintln!("usage: engine SOCKET STATE DEVICE KEYFILE [GENERATION]");
        return ExitCode::from(2);
    };
    let filter = tracing_subscriber::EnvFilter::new("info");
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let options = WorkerOptions {
        socket: socket.into(),
        state: state.into(),
        device: device.clone(),
        private_key: private_key.into(),
    };
    match mesh_overlay::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("engine: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                eprintln!("  because: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}
