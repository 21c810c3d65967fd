//! One question to the cluster's DNS server, from where the pod would ask it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use mesh_kernel::NetNs;
use mesh_model::trace::NameAnswer;
use tokio::net::UdpSocket;

use crate::check::question;

/// A server on this node that takes longer does not work.
const WAIT: Duration = Duration::from_millis(1500);

/// The names that a pod's resolver tries for one that is no service's, by the pod's search list.
pub(super) fn candidates(host: &str, namespace: &str, domain: &str) -> Vec<String> {
    if host.ends_with('.') {
        return vec![host.to_owned()];
    }
    let search = [format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.to_owned()];
    let searched = search.iter().map(|suffix| format!("{host}.{suffix}"));
    // Nobody outside has a name of one word.
    let alone = host.contains('.').then(|| host.to_owned());
    searched.chain(alone).collect()
}

/// What the server answers to questions for the IPv4 addresses of these names, up to the first that has some.
pub(super) async fn ask(namespace: &NetNs, server: SocketAddr, names: &[String]) -> NameAnswer {
    let mut last = NameAnswer::NoAddress;
    for name in names {
        last = one(namespace, server, name).await;
        if last != NameAnswer::NoAddress {
            return last;
        }
    }
    last
}

async fn one(namespace: &NetNs, server: SocketAddr, name: &str) -> NameAnswer {
    match tokio::time::timeout(WAIT, exchange(namespace, server, name)).await {
        Ok(Ok(answer)) => read(&answer),
        Ok(Err(error)) => NameAnswer::Failed(error.to_string()),
        Err(_) => NameAnswer::Silent,
    }
}

async fn exchange(namespace: &NetNs, server: SocketAddr, name: &str) -> io::Result<Vec<u8>> {
    let socket = namespace.run(|| std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
    socket.set_nonblocking(true)?;
    let socket = UdpSocket::from_std(socket)?;
    socket.connect(server).await?;
    socket.send(&question::encode(name)).await?;
    let mut answer = vec![0; 1232];
    let length = socket.recv(&mut answer).await?;
    answer.truncate(length);
    Ok(answer)
}

fn read(answer: &[u8]) -> NameAnswer {
    match question::verdict(answer) {
        Ok(()) => match addresses(answer) {
            Some(all) if !all.is_empty() => NameAnswer::Addresses(all),
            _ => NameAnswer::NoAddress,
        },
        Err(_) if answer.get(3).is_some_and(|flags| matches!(flags & 0xf, 0 | 3)) => {
            NameAnswer::NoAddress
        }
        Err(why) => NameAnswer::Failed(why),
    }
}

/// Addresses of the answer section (RFC 1035, section 4.1.3). Nothing when it is malformed.
fn addresses(message: &[u8]) -> Option<Vec<IpAddr>> {
    let count = u16::from_be_bytes([*message.get(6)?, *message.get(7)?]);
    // Header, then one question: its name, type and class.
    let mut at = skip_name(message, 12)? + 4;
    let mut found = Vec::new();
    for _ in 0..count {
        at = skip_name(message, at)?;
        let head: [u8; 10] = message.get(at..at + 10)?.try_into().ok()?;
        let length = usize::from(u16::from_be_bytes([head[8], head[9]]));
        let data = message.get(at + 10..at + 10 + length)?;
        if let ([0, 1], Ok(v4)) = (&head[..2], <[u8; 4]>::try_from(data)) {
            found.push(IpAddr::from(v4));
        }
        at += 10 + length;
    }
    Some(found)
}

/// The place behind a name: labels up to an empty one, or up to a reference.
fn skip_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            length if length & 0xc0 == 0xc0 => return Some(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_tried_as_a_resolver_does() {
        let tried = |host| candidates(host, "shop", "cluster.local");
        let word = ["a.shop.svc.cluster.local", "a.svc.cluster.local", "a.cluster.local"];
        assert_eq!(tried("a"), word);
        assert_eq!(tried("a.example").last().map(String::as_str), Some("a.example"));
        assert_eq!(tried("a.example."), ["a.example."]);
    }

    #[test]
    fn addresses_are_found_behind_aliases() {
        let mut answer = question::encode("web.example");
        answer[2] = 0x81;
        answer[7] = 2;
        // An alias to `a`, and the address of what the question names.
        answer.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 3, 1, b'a', 0]);
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 7]);
        assert_eq!(read(&answer), NameAnswer::Addresses(vec!["192.0.2.7".parse().unwrap()]));
        let short = &answer[..answer.len() - 1];
        assert_eq!(read(short), NameAnswer::NoAddress);
        answer[3] = 3;
        assert_eq!(read(&answer), NameAnswer::NoAddress);
        answer[3] = 5;
        assert!(matches!(read(&answer), NameAnswer::Failed(_)));
    }
}
