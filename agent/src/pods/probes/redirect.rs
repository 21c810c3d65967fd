//! Where an answer of HTTP sends a probe: as the kubelet, it follows as long as it stays with the container.

use hyper::Uri;

use super::http::Request;

/// The next request. None when another host is meant, which the container does not answer for, or nothing that can be asked.
pub(super) fn next(request: &Request, location: &str) -> Option<Request> {
    let scheme = if request.tls { "https" } else { "http" };
    let absolute = match location {
        _ if location.starts_with("//") => format!("{scheme}:{location}"),
        _ if location.contains("://") => location.to_owned(),
        _ => {
            let path = join(&request.path, location);
            return Some(Request { path, ..request.clone() });
        }
    };
    let uri: Uri = absolute.split('#').next()?.parse().ok()?;
    let tls = match uri.scheme_str()? {
        "http" => false,
        "https" => true,
        _ => return None,
    };
    let bare = |host: &str| host.trim_start_matches('[').trim_end_matches(']').to_owned();
    if bare(uri.host()?) != bare(&request.host) {
        return None;
    }
    // A name that was asked for was the former address's.
    let headers = request.headers.iter().filter(|(name, _)| !name.eq_ignore_ascii_case("host"));
    Some(Request {
        port: uri.port_u16().unwrap_or(if tls { 443 } else { 80 }),
        path: uri.path_and_query().map_or("/", |path| path.as_str()).to_owned(),
        tls,
        headers: headers.cloned().collect(),
        ..request.clone()
    })
}

/// A reference without a host, from that path (RFC 3986, section 5.2).
fn join(from: &str, reference: &str) -> String {
    let reference = reference.split('#').next().unwrap_or_default();
    let from = from.split('?').next().unwrap_or_default();
    let (path, query) = match reference.split_once('?') {
        Some((path, query)) => (path, format!("?{query}")),
        None => (reference, String::new()),
    };
    let path = match path {
        "" => from.to_owned(),
        _ if path.starts_with('/') => path.to_owned(),
        _ => format!("{}/{path}", from.rsplit_once('/').map_or("", |(directory, _)| directory)),
    };
    let mut parts: Vec<&str> = Vec::new();
    let mut is_directory = false;
    for part in path.split('/').skip(usize::from(path.starts_with('/'))) {
        is_directory = matches!(part, "." | "..");
        match part {
            "." => {}
            ".." => drop(parts.pop()),
            _ => parts.push(part),
        }
    }
    let end = if is_directory && !parts.is_empty() { "/" } else { "" };
    format!("/{}{end}{query}", parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(path: &str) -> Request {
        Request {
            host: "10.244.1.5".to_owned(),
            port: 8080,
            path: path.to_owned(),
            tls: false,
            headers: vec![("Host".into(), "shop.example".into()), ("X-A".into(), "b".into())],
            any_status: false,
        }
    }

    #[test]
    fn a_container_may_send_a_probe_about_in_itself() {
        let of = |location: &str| next(&request("/a/b?c=d"), location).unwrap().path;
        for (location, path) in [
            ("/login", "/login"),
            ("login?x=y#z", "/a/login?x=y"),
            ("./ui/", "/a/ui/"),
            ("..", "/"),
            ("../../../x", "/x"),
            ("?q", "/a/b?q"),
            ("/a/./b/../c", "/a/c"),
        ] {
            assert_eq!(of(location), path, "{location}");
        }
        let moved = next(&request("/"), "/x").unwrap();
        assert_eq!((moved.port, moved.headers.len()), (8080, 2));
        let secure = next(&request("/"), "https://10.244.1.5/x?y").unwrap();
        assert_eq!((secure.tls, secure.port, secure.path.as_str()), (true, 443, "/x?y"));
        assert_eq!(secure.headers, [("X-A".to_owned(), "b".to_owned())]);
        let here = next(&request("/"), "//10.244.1.5:81/x").unwrap();
        assert_eq!((here.tls, here.port), (false, 81));
        let six = Request { host: "fd10::5".to_owned(), ..request("/") };
        assert_eq!(next(&six, "http://[fd10::5]:81/").unwrap().port, 81);
    }

    #[test]
    fn it_is_not_sent_elsewhere() {
        for location in ["https://shop.example/", "//192.0.2.1/x", "ftp://10.244.1.5/", "http://"] {
            assert_eq!(next(&request("/"), location), None, "{location}");
        }
    }
}
