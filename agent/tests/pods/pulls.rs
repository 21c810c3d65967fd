//! Images from a registry: with and without credentials, as often as the policy says.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::api::Api;
use crate::machine;
use crate::registry::{PASSWORD, Registry, USER};

/// Runs once and ends well, when its image can be had.
fn pod(image: &str, secret: Option<&str>, policy: Option<&str>) -> Value {
    let mut container = json!({"name": "c", "image": image, "command": ["true"]});
    if let Some(policy) = policy {
        container["imagePullPolicy"] = policy.into();
    }
    let secrets: Vec<Value> = secret.into_iter().map(|name| json!({"name": name})).collect();
    json!({"restartPolicy": "Never", "containers": [container], "imagePullSecrets": secrets})
}

/// What `kubectl create secret docker-registry` makes.
fn credentials(api: &Api, secret: &str, host: &str, password: &str) {
    let auth = STANDARD.encode(format!("{USER}:{password}"));
    let config = json!({"auths": {host: {"auth": auth}}}).to_string();
    let values = [(".dockerconfigjson".to_owned(), config.into_bytes())].into();
    api.with(|state| state.secrets.insert(secret.to_owned(), values));
}

fn waits_with(api: &Api, name: &str) -> String {
    let state = api.container(name).and_then(|c| c.state).and_then(|s| s.waiting);
    state.and_then(|waiting| waiting.message).unwrap_or_default()
}

#[test]
fn images_are_pulled_with_the_credentials_of_their_pods() {
    let name = "pulls::images_are_pulled_with_the_credentials_of_their_pods";
    machine::run(name, async |rig| {
        let (api, registry) = (rig.api.clone(), Registry::start().await);
        let host = registry.host();
        credentials(&api, "right", &host, PASSWORD);
        credentials(&api, "wrong", &host, "other");
        credentials(&api, "elsewhere", "registry.test", PASSWORD);
        let image = |name: &str| format!("{host}/locked/{name}:1");
        api.apply("member", pod(&image("a"), Some("right"), None));
        api.apply("stranger", pod(&image("b"), None, None));
        api.apply("mistaken", pod(&image("c"), Some("wrong"), None));
        api.apply("misled", pod(&image("d"), Some("elsewhere"), None));
        let runner = rig.runner();
        rig.until(&runner, "the member has its image", |api| api.phase("member") == "Succeeded")
            .await;
        for name in ["stranger", "mistaken", "misled"] {
            rig.until(&runner, "nobody else has", |api| api.waiting(name) == "ImagePullBackOff")
                .await;
            let said = waits_with(&api, name);
            assert!(said.contains(&host), "{said}");
            assert_eq!(api.phase(name), "Pending");
        }
        for name in ["b", "c", "d"] {
            assert_eq!(registry.told(&format!("locked/{name}:1")), 0, "{name}");
        }
        credentials(&api, "wrong", &host, PASSWORD);
        rig.until(&runner, "the mistake is corrected", |api| api.phase("mistaken") == "Succeeded")
            .await;
        assert_ne!(api.phase("stranger"), "Succeeded");
    });
}

#[test]
fn images_are_pulled_as_often_as_the_policy_says() {
    let name = "pulls::images_are_pulled_as_often_as_the_policy_says";
    machine::run(name, async |rig| {
        let (api, registry) = (rig.api.clone(), Registry::start().await);
        let image = |name: &str| format!("{}/open/{name}", registry.host());
        let runner = rig.runner();
        // Policy, image, and whether the second pod asks the registry again.
        let table = [
            ("once", None, "a:1", "a:1", false),
            ("always", Some("Always"), "b:1", "b:1", true),
            ("latest", None, "c", "c:latest", true),
            ("kept", Some("IfNotPresent"), "d:latest", "d:latest", false),
        ];
        for turn in ["first", "second"] {
            for (name, policy, reference, told, again) in table {
                let before = registry.told(&format!("open/{told}"));
                let name = format!("{name}-{turn}");
                api.apply(&name, pod(&image(reference), None, policy));
                rig.until(&runner, &name, |api| api.phase(&name) == "Succeeded").await;
                let asked = registry.told(&format!("open/{told}")) > before;
                assert_eq!(asked, turn == "first" || again, "{name}");
                let said = if asked { "Successfully pulled image" } else { "already present" };
                let tells = |api: &Api| {
                    api.read(|s| {
                        s.events.iter().any(|e| e.pod.name == name && e.message.contains(said))
                    })
                };
                rig.until(&runner, "it is told", tells).await;
            }
        }
        api.apply("never", pod(&image("e:1"), None, Some("Never")));
        rig.until(&runner, "it is not there", |api| api.waiting("never") == "ErrImageNeverPull")
            .await;
        api.apply("there", pod(&image("a:1"), None, Some("Never")));
        rig.until(&runner, "it is there", |api| api.phase("there") == "Succeeded").await;
        assert_eq!(registry.told("open/e:1"), 0, "the registry was not asked");
    });
}
