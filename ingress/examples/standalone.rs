//! The proxy alone, for trying and measuring: every request goes to the given backends.
//!
//! `standalone --http ADDR --https ADDR --backend ADDR [--backend ADDR] [--cert PEM --key PEM] [--threads N]`

use std::error::Error;
use std::net::SocketAddr;

use mesh_ingress::{Listeners, Proxy, ProxyOptions};
use mesh_model::ObjectKey;
use mesh_model::snapshot::{Certificate, HttpRoute, L7Config, PathMatch};

fn main() -> Result<(), Box<dyn Error>> {
    let (mut http, mut https, mut backends) = (Vec::new(), Vec::new(), Vec::new());
    let (mut cert, mut key) = (None, None);
    let mut options = ProxyOptions::default();
    let mut args = std::env::args().skip(1);
    while let (Some(name), Some(value)) = (args.next(), args.next()) {
        let address = || value.parse::<SocketAddr>();
        match name.as_str() {
            "--http" => http.push(address()?),
            "--https" => https.push(address()?),
            "--backend" => backends.push(address()?),
            "--cert" => cert = Some(std::fs::read_to_string(&value)?),
            "--key" => key = Some(std::fs::read_to_string(&value)?),
            "--threads" => options.threads = value.parse()?,
            other => return Err(format!("unknown option {other}").into()),
        }
    }
    let certificate = cert.zip(key).map(|(chain_pem, key_pem)| Certificate {
        secret: ObjectKey::new("default", "standalone"),
        hosts: vec![],
        chain_pem,
        key_pem,
    });
    let proxy = Proxy::start(Listeners::bind(&http, &https, options.threads)?, options)?;
    proxy.apply(&L7Config {
        routes: vec![HttpRoute {
            ingress: ObjectKey::new("default", "standalone"),
            host: None,
            path: PathMatch::Prefix("/".into()),
            service: ObjectKey::new("default", "standalone"),
            port: 80,
            backends,
        }],
        certificates: certificate.into_iter().collect(),
    });
    println!("http {:?} https {:?}", proxy.http(), proxy.https());
    for problem in proxy.status().problems {
        eprintln!("{}: {}", problem.object, problem.reason);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(tokio::signal::ctrl_c())?;
    runtime.block_on(proxy.drain());
    Ok(())
}
