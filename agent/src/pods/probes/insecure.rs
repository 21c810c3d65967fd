//! TLS without looking at the certificate: a probe asks whether the container answers, not who it is, and containers
//! have certificates that the node cannot know (Kubernetes, "HTTP probes"). As any of them will do, also of a form that our
//! library does not read (version 1, small keys), proof that its owner answers would prove nothing.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Makes a TLS connection with whoever answers.
pub(super) async fn handshake(stream: TcpStream) -> Result<TlsStream<TcpStream>, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let peer = stream.peer_addr().map_err(|e| format!("TLS: {e}"))?;
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| format!("TLS: {e}"))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
        .with_no_client_auth();
    let name = ServerName::IpAddress(peer.ip().into());
    let connector = TlsConnector::from(Arc::new(config));
    connector.connect(name, stream).await.map_err(|e| format!("TLS: {e}"))
}

#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rustls::SupportedProtocolVersion;
    use rustls::server::{ClientHello, ResolvesServerCert};
    use rustls::sign::CertifiedKey;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_rustls::TlsAcceptor;

    use super::super::http::{Request, get};
    use super::*;

    /// Shows a certificate whatever it is.
    #[derive(Debug)]
    struct Shown(Arc<CertifiedKey>);

    impl ResolvesServerCert for Shown {
        fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
            Some(Arc::clone(&self.0))
        }
    }

    async fn asked(
        certificate: CertificateDer<'static>,
        version: &'static SupportedProtocolVersion,
    ) {
        let key = rcgen::KeyPair::generate().unwrap().serialize_der();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let key = provider.key_provider.load_private_key(key.try_into().unwrap()).unwrap();
        let shown = Shown(Arc::new(CertifiedKey::new(vec![certificate], key)));
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(shown));
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let acceptor = TlsAcceptor::from(Arc::new(config));
            let mut stream = acceptor.accept(stream).await.unwrap();
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            stream.flush().await.unwrap();
        });
        let request = Request {
            host: "127.0.0.1".to_owned(),
            port,
            path: "/".to_owned(),
            tls: true,
            headers: Vec::new(),
            any_status: false,
        };
        assert_eq!(get(&request).await, Ok(None));
        server.await.unwrap();
    }

    #[tokio::test]
    async fn any_certificate_will_do() {
        let names = vec!["unknown.example".to_owned()];
        let unknown = rcgen::generate_simple_self_signed(names).unwrap().cert.der().clone();
        // An empty sequence: nothing that our library could read.
        let strange = CertificateDer::from(vec![0x30, 0]);
        for certificate in [unknown, strange] {
            for version in rustls::ALL_VERSIONS {
                asked(certificate.clone(), version).await;
            }
        }
    }
}
