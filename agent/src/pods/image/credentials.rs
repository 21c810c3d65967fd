//! Credentials of registries: which of a pod's `imagePullSecrets` are meant for an image.
//!
//! An entry names a host, in whose parts `*` stands for anything, and may name the beginning of a path (Kubernetes, "Interpretation
//! of config.json").

use std::collections::BTreeMap;

use base64::Engine as _;
use k8s_openapi::api::core::v1::PodSpec;
use mesh_cri::v1;
use mesh_model::snapshot::PodWork;

const DOCKER_HUB: &str = "docker.io";

/// The pod's credentials for an image: those of one Secret after the other, and of the most exact entry first.
pub(super) fn credentials(work: &PodWork, image: &str) -> Vec<v1::AuthConfig> {
    let secrets = |spec: &PodSpec| spec.image_pull_secrets.clone().unwrap_or_default();
    let names = work.pod.spec.as_ref().map(secrets).unwrap_or_default();
    let values = names.iter().filter_map(|reference| work.secrets.get(&reference.name));
    values.flat_map(|secret| of_secret(secret, image)).collect()
}

fn of_secret(secret: &BTreeMap<String, Vec<u8>>, image: &str) -> Vec<v1::AuthConfig> {
    let parse =
        |key: &str| -> Option<serde_json::Value> { serde_json::from_slice(secret.get(key)?).ok() };
    let auths = match (parse(".dockerconfigjson"), parse(".dockercfg")) {
        (Some(config), _) => config.get("auths").cloned().unwrap_or_default(),
        (None, Some(config)) => config,
        (None, None) => return Vec::new(),
    };
    let entries = auths.as_object().into_iter().flatten().map(|(name, entry)| (of(name), entry));
    let mut entries: Vec<_> = entries.filter(|(of, _)| is_meant(*of, place(image))).collect();
    entries.sort_by_key(|((host, path), _)| (host.contains('*'), std::cmp::Reverse(path.len())));
    entries.into_iter().filter_map(|(_, entry)| auth(entry)).collect()
}

/// Host and path of an image; without a host it is one of Docker Hub.
fn place(image: &str) -> (&str, String) {
    let is_host = |part: &str| part.contains(['.', ':']) || part == "localhost";
    match image.split_once('/') {
        Some((host, path)) if is_host(host) => (hub(host), format!("/{path}")),
        Some(_) => (DOCKER_HUB, format!("/{image}")),
        None => (DOCKER_HUB, format!("/library/{image}")),
    }
}

/// Host and path of an entry: `https://index.docker.io/v1/` -> `docker.io`, without a path.
fn of(entry: &str) -> (&str, &str) {
    let bare = entry.strip_prefix("https://").or(entry.strip_prefix("http://")).unwrap_or(entry);
    let (host, path) = bare.split_at(bare.find('/').unwrap_or(bare.len()));
    let version = |version| path.strip_prefix(version).filter(|rest| rest.starts_with('/'));
    let path = version("/v1").or(version("/v2")).unwrap_or(path);
    (hub(host), if path == "/" { "" } else { path })
}

fn hub(host: &str) -> &str {
    match host {
        "index.docker.io" | "registry-1.docker.io" => DOCKER_HUB,
        host => host,
    }
}

fn is_meant((pattern, beginning): (&str, &str), (host, path): (&str, String)) -> bool {
    let split = |name: &str| name.split(['.', ':']).map(str::to_owned).collect::<Vec<_>>();
    let (patterns, parts) = (split(pattern), split(host));
    let has_port = |name: &str| name.contains(':');
    patterns.len() == parts.len()
        && has_port(pattern) == has_port(host)
        && patterns.iter().zip(&parts).all(|(pattern, part)| is_like(pattern, part))
        && path.starts_with(beginning)
}

/// Whether a part of a name is as the pattern says.
fn is_like(pattern: &str, part: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == part,
        Some((before, after)) => part.strip_prefix(before).is_some_and(|rest| {
            (0..=rest.len()).any(|at| rest.is_char_boundary(at) && is_like(after, &rest[at..]))
        }),
    }
}

fn auth(entry: &serde_json::Value) -> Option<v1::AuthConfig> {
    let text = |key: &str| entry.get(key).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
    let (mut username, mut password) = (text("username"), text("password"));
    if username.is_empty() {
        let decoded = base64::engine::general_purpose::STANDARD.decode(text("auth")).ok()?;
        let decoded = String::from_utf8(decoded).ok()?;
        let (user, secret) = decoded.split_once(':')?;
        (username, password) = (user.to_owned(), secret.to_owned());
    }
    Some(v1::AuthConfig {
        username,
        password,
        identity_token: text("identitytoken"),
        registry_token: text("registrytoken"),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The users that are tried for an image, where each entry has its own.
    fn users(entries: &[&str], image: &str) -> Vec<String> {
        let auth = |user: &&str| (user.to_string(), serde_json::json!({"username": user}));
        let auths: serde_json::Map<_, _> = entries.iter().map(auth).collect();
        let config = serde_json::json!({"auths": auths}).to_string().into_bytes();
        let secret = [(".dockerconfigjson".to_owned(), config)].into();
        of_secret(&secret, image).into_iter().map(|auth| auth.username).collect()
    }

    #[test]
    fn an_entry_is_for_its_host_and_what_begins_as_its_path() {
        let entries = ["r.test", "r.test/team", "https://r.test/v2/", "r.test:5000", "other.test"];
        assert_eq!(
            users(&entries, "r.test/team/web:1")[0],
            "r.test/team",
            "the most exact one first"
        );
        assert_eq!(users(&entries, "r.test/team/web:1").len(), 3);
        assert_eq!(users(&entries, "r.test/web"), ["https://r.test/v2/", "r.test"]);
        assert_eq!(users(&entries, "r.test:5000/web"), ["r.test:5000"]);
        assert!(users(&entries, "web").is_empty());
    }

    #[test]
    fn a_star_stands_for_a_part_of_a_host() {
        let entries = ["*.r.test", "a*-x.r.test:80", "a.r.test"];
        assert_eq!(users(&entries, "a.r.test/web"), ["a.r.test", "*.r.test"]);
        assert_eq!(users(&entries, "abc-x.r.test:80/web"), ["a*-x.r.test:80"]);
        for other in ["r.test/web", "a.b.r.test/web", "abc.r.test:80/web", "bc-x.r.test:80/web"] {
            assert!(users(&entries, other).is_empty(), "{other}");
        }
    }

    #[test]
    fn docker_hub_has_many_names() {
        for name in ["https://index.docker.io/v1/", "docker.io", "registry-1.docker.io"] {
            for image in ["web:1", "library/web", "docker.io/library/web"] {
                assert_eq!(users(&[name], image), [name], "{image}");
            }
        }
        assert_eq!(users(&["docker.io/team"], "team/web"), ["docker.io/team"]);
        assert!(users(&["docker.io/team"], "web").is_empty());
    }

    #[test]
    fn credentials_are_chosen_by_registry() {
        let config = serde_json::json!({"auths": {
            "https://index.docker.io/v1/": {"auth": "dTpw"},
            "registry.example:5000": {"username": "a", "password": "b"},
            "broken.example": {"auth": "%%%"}}});
        let work = PodWork {
            pod: serde_json::from_value(serde_json::json!({"spec": {"containers": [], "imagePullSecrets": [{"name": "s"}, {"name": "gone"}]}})).unwrap(),
            config_maps: Default::default(),
            binary_keys: Default::default(),
            secrets: [("s".to_owned(), [(".dockerconfigjson".to_owned(), config.to_string().into_bytes())].into())].into(),
            service_env: Default::default(),
            departure: None,
        };
        let user = |image: &str| {
            let all = credentials(&work, image);
            all.iter().map(|a| format!("{}:{}", a.username, a.password)).collect::<Vec<_>>()
        };
        assert_eq!(user("web:1"), ["u:p"]);
        assert_eq!(user("library/web"), ["u:p"]);
        assert_eq!(user("registry.example:5000/x/web"), ["a:b"]);
        assert!(user("broken.example/web").is_empty());
        assert!(user("other.example/web").is_empty());
    }
}
