use proptest::prelude::*;

use super::*;

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(u8::try_from(value & 0x7f).unwrap() | 0x80);
        value >>= 7;
    }
    out.push(u8::try_from(value).unwrap());
}

fn bytes(field: u64, content: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    varint(field << 3 | 2, &mut out);
    varint(content.len() as u64, &mut out);
    out.extend_from_slice(content);
    out
}

fn number(field: u64, value: i64) -> Vec<u8> {
    let mut out = Vec::new();
    varint(field << 3, &mut out);
    varint(u64::from_ne_bytes(value.to_ne_bytes()), &mut out);
    out
}

fn body(version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
    let meta = [bytes(1, version.as_bytes()), bytes(2, kind.as_bytes())].concat();
    [MAGIC.to_vec(), bytes(1, &meta), bytes(2, raw), bytes(3, b""), bytes(4, b"")].concat()
}

#[test]
fn every_message_of_the_table_is_there() {
    let special = ["s", "b", "i", "t", "skip", "Time", "MicroTime", "Quantity", "IntOrString"];
    for (name, fields) in messages() {
        for field in fields.values() {
            let known = special.contains(&field.type_) || messages().contains_key(field.type_);
            assert!(known, "{name}.{}: {}", field.name, field.type_);
        }
    }
}

#[test]
fn a_deployment_as_kubectl_writes_it() {
    let resources = bytes(2, &[bytes(1, b"cpu"), bytes(2, &bytes(1, b"100m"))].concat());
    let container =
        [bytes(1, b"c"), bytes(2, b"image"), bytes(5, b""), bytes(8, &resources), number(16, 0)]
            .concat();
    let pod_spec = [bytes(2, &container), bytes(3, b""), number(11, 0)].concat();
    let labels = bytes(11, &[bytes(1, b"app"), bytes(2, b"web")].concat());
    let template = [bytes(1, &labels), bytes(2, &pod_spec)].concat();
    let rolling = bytes(2, &bytes(1, &[number(1, 1), number(2, 0), bytes(3, b"25%")].concat()));
    let spec = [number(1, 0), bytes(3, &template), bytes(4, &rolling), number(5, 0)].concat();
    let zero_time = bytes(8, &[number(1, -62_135_596_800), number(2, 0)].concat());
    let meta = [bytes(1, b"web"), bytes(2, b""), zero_time].concat();
    let raw = [bytes(1, &meta), bytes(2, &spec), bytes(3, b"")].concat();
    let object = decode(&body("apps/v1", "Deployment", &raw)).unwrap();
    assert_eq!(
        object,
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
            "spec": {"replicas": 0,
                "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [
                    {"name": "c", "image": "image", "resources": {"requests": {"cpu": "100m"}}}]}},
                "strategy": {"rollingUpdate": {"maxUnavailable": "25%"}}},
            "status": {}})
    );
}

#[test]
fn a_number_of_none_is_a_number() {
    // As `kubectl create poddisruptionbudget --max-unavailable=0` says it.
    let none = [number(1, 0), number(2, 0), bytes(3, b"")].concat();
    let budget = bytes(2, &bytes(3, &none));
    let object = decode(&body("policy/v1", "PodDisruptionBudget", &budget)).unwrap();
    assert_eq!(object["spec"], json!({"maxUnavailable": 0}));
    let object = decode(&body("policy/v1", "PodDisruptionBudget", &bytes(2, &bytes(1, &none))));
    assert_eq!(object.unwrap()["spec"], json!({"minAvailable": 0}));
    let rolling = bytes(2, &[bytes(1, &none), bytes(2, &none)].concat());
    let object = decode(&body("apps/v1", "Deployment", &bytes(2, &bytes(4, &rolling)))).unwrap();
    let parts = json!({"maxUnavailable": 0, "maxSurge": 0});
    assert_eq!(object["spec"]["strategy"]["rollingUpdate"], parts);
    // A port of a Service has one all the time: there it says nothing.
    let port = [number(3, 80), bytes(4, &none)].concat();
    let object = decode(&body("v1", "Service", &bytes(2, &bytes(1, &port)))).unwrap();
    assert_eq!(object["spec"]["ports"], json!([{"port": 80}]));
}

#[test]
fn ports_of_endpoints_are_not_those_of_slices() {
    let port = [bytes(1, b"sql"), number(2, 5432), bytes(3, b"TCP")].concat();
    let address = |ip: &[u8]| [bytes(1, ip), bytes(3, b"")].concat();
    let subset =
        [bytes(1, &address(b"192.0.2.7")), bytes(2, &address(b"192.0.2.8")), bytes(3, &port)]
            .concat();
    let object = decode(&body("v1", "Endpoints", &bytes(2, &subset))).unwrap();
    let subset = json!({"addresses": [{"ip": "192.0.2.7"}], "notReadyAddresses": [{"ip": "192.0.2.8"}],
        "ports": [{"name": "sql", "port": 5432, "protocol": "TCP"}]});
    assert_eq!(object["subsets"], json!([subset]));
}

#[test]
fn a_job_as_kubectl_writes_it() {
    let codes = [bytes(1, b"c"), bytes(2, b"In"), number(3, 3), number(3, 42)].concat();
    let rule = [bytes(1, b"FailJob"), bytes(2, &codes)].concat();
    let pod = [bytes(2, &[bytes(1, b"c"), bytes(2, b"i")].concat()), bytes(3, b"Never")].concat();
    let spec = [
        number(1, 0),
        number(2, 4),
        bytes(6, &bytes(2, &pod)),
        number(7, 0),
        number(8, 60),
        bytes(9, b"Indexed"),
        number(10, 1),
        bytes(11, &bytes(1, &rule)),
    ]
    .concat();
    let object = decode(&body("batch/v1", "Job", &bytes(2, &spec))).unwrap();
    let rule = json!({"action": "FailJob", "onExitCodes": {"containerName": "c", "operator": "In", "values": [3, 42]}});
    let template =
        json!({"spec": {"containers": [{"name": "c", "image": "i"}], "restartPolicy": "Never"}});
    let expected = json!({"parallelism": 0, "completions": 4, "backoffLimit": 0, "ttlSecondsAfterFinished": 60,
        "completionMode": "Indexed", "suspend": true, "podFailurePolicy": {"rules": [rule]}, "template": template});
    assert_eq!(object["spec"], expected);
    let cron = [
        bytes(1, b"@hourly"),
        number(2, 0),
        number(4, 0),
        bytes(5, &bytes(2, &spec)),
        number(7, 0),
    ];
    let object = decode(&body("batch/v1", "CronJob", &bytes(2, &cron.concat()))).unwrap();
    let expected = json!({"schedule": "@hourly", "startingDeadlineSeconds": 0, "suspend": false,
        "jobTemplate": {"spec": expected}, "failedJobsHistoryLimit": 0});
    assert_eq!(object["spec"], expected);
}

#[test]
fn a_question_about_access_as_kubectl_asks_it() {
    let asked = [bytes(1, b"shop"), bytes(2, b"get"), bytes(3, b""), bytes(5, b"pods")].concat();
    let status = bytes(3, &[number(1, 0), bytes(2, b""), bytes(3, b""), number(4, 0)].concat());
    let raw = [bytes(1, b""), bytes(2, &bytes(1, &asked)), status].concat();
    let object = decode(&body("authorization.k8s.io/v1", "SelfSubjectAccessReview", &raw)).unwrap();
    let asked = json!({"namespace": "shop", "verb": "get", "resource": "pods"});
    assert_eq!(object["spec"], json!({"resourceAttributes": asked}));
    let nothing = bytes(3, &[number(3, 0), bytes(4, b"")].concat());
    let raw = [bytes(1, b""), bytes(2, &bytes(1, b"shop")), nothing].concat();
    let object = decode(&body("authorization.k8s.io/v1", "SelfSubjectRulesReview", &raw)).unwrap();
    assert_eq!(object["spec"], json!({"namespace": "shop"}));
}

#[test]
fn inlined_messages_bytes_and_times() {
    let reference = bytes(1, &bytes(1, b"map"));
    let volume = [bytes(1, b"v"), bytes(2, &bytes(19, &reference))].concat();
    let raw = bytes(2, &bytes(1, &volume));
    let object = decode(&body("v1", "Pod", &raw)).unwrap();
    assert_eq!(object["spec"]["volumes"], json!([{"name": "v", "configMap": {"name": "map"}}]));
    let raw = [
        bytes(1, &bytes(8, &number(1, 1_700_000_000))),
        bytes(2, &[bytes(1, b"k"), bytes(2, b"\x00\xff")].concat()),
    ]
    .concat();
    let object = decode(&body("v1", "Secret", &raw)).unwrap();
    assert_eq!(object["metadata"]["creationTimestamp"], "2023-11-14T22:13:20Z");
    assert_eq!(object["data"]["k"], "AP8=");
}

#[test]
fn what_is_not_understood_is_refused() {
    assert_eq!(decode(b"{}"), Err(DecodeError::Magic));
    let unknown = decode(&body("v1", "ConfigMap", &number(99, 1)));
    assert_eq!(unknown, Err(DecodeError::Field { message: "ConfigMap".to_owned(), field: 99 }));
    let kind = decode(&body("batch/v1", "Frob", b""));
    assert_eq!(kind, Err(DecodeError::Kind("Frob".to_owned())));
    let wrong = decode(&body("v1", "ConfigMap", &number(1, 1)));
    assert!(matches!(wrong, Err(DecodeError::Damaged(_))));
}

proptest! {
    #[test]
    fn nothing_panics(raw in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode(&body("v1", "Pod", &raw));
        let _ = decode(&[MAGIC, &raw].concat());
    }
}
