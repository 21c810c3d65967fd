use serde_json::{Value, json};

use k8s_openapi::api::batch::v1::CronJob;

use super::*;

fn patched(patch: &Value) -> Value {
    let mut base = json!({"metadata": {"name": "j", "namespace": "n", "uid": "u"}, "spec": {
        "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}}});
    json_patch::merge(&mut base, patch);
    base
}

fn job(patch: Value) -> Job {
    let mut object: Job = serde_json::from_value(patched(&patch)).unwrap();
    object.prepare_create();
    object.set_defaults();
    object.settle_name();
    object
}

fn texts(causes: Causes) -> Vec<String> {
    causes.into_vec().into_iter().map(|c| format!("{}: {}", c.field, c.message)).collect()
}

fn causes(patch: Value) -> Vec<String> {
    let mut causes = Causes::default();
    job(patch).validate(&mut causes);
    texts(causes)
}

#[test]
fn a_job_selects_its_own_pods() {
    let object = job(json!({"metadata": {"labels": {"team": "a"}},
        "spec": {"template": {"metadata": {"labels": {"app": "x"}}}}}));
    let spec = object.spec.as_ref().unwrap();
    let labels = spec.template.metadata.as_ref().unwrap().labels.clone().unwrap();
    let expected = [
        ("app", "x"),
        ("batch.kubernetes.io/controller-uid", "u"),
        ("batch.kubernetes.io/job-name", "j"),
        ("controller-uid", "u"),
        ("job-name", "j"),
    ];
    assert_eq!(labels, expected.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
    let selector = serde_json::to_value(&spec.selector).unwrap();
    assert_eq!(selector, json!({"matchLabels": {"batch.kubernetes.io/controller-uid": "u"}}));
    assert_eq!(object.metadata.labels.unwrap().len(), 1, "it has its own");
    assert_eq!(job(json!({})).metadata.labels.unwrap()["job-name"], "j");

    let by_hand = json!({"spec": {"manualSelector": true, "selector": {"matchLabels": {"app": "x"}},
        "template": {"metadata": {"labels": {"app": "x"}}}}});
    let spec = job(by_hand.clone()).spec.unwrap();
    assert_eq!(spec.template.metadata.unwrap().labels.unwrap().len(), 1);
    assert_eq!(causes(by_hand), [""; 0]);
    let by_its_name = json!({"spec": {"selector": {"matchLabels": {"job-name": "j"}}}});
    assert_eq!(causes(by_its_name), [""; 0]);
}

#[test]
fn many_indexes_need_a_bound_for_those_that_fail() {
    let of = |spec: Value| {
        let mut large =
            json!({"completionMode": "Indexed", "completions": 100_001, "parallelism": 10_001});
        json_patch::merge(&mut large, &spec);
        causes(json!({"spec": large}))
    };
    assert_eq!(of(json!({})), [""; 0]);
    assert!(of(json!({"parallelism": 100_001}))[0].contains("when completion mode is Indexed"));
    let limited = of(json!({"backoffLimitPerIndex": 1}));
    let starts =
        ["spec.parallelism: Invalid value: 10001", "spec.maxFailedIndexes: Required value"];
    assert!(
        limited.len() == 2 && limited.iter().zip(starts).all(|(l, s)| l.starts_with(s)),
        "{limited:?}"
    );
    let bounded =
        json!({"backoffLimitPerIndex": 1, "maxFailedIndexes": 10_000, "parallelism": 10_000});
    assert_eq!(of(bounded), [""; 0]);
}

#[test]
fn defaults_are_those_of_kubernetes() {
    let spec = job(json!({})).spec.unwrap();
    assert_eq!(
        (spec.parallelism, spec.completions, spec.backoff_limit),
        (Some(1), Some(1), Some(6))
    );
    assert_eq!(spec.completion_mode.as_deref(), Some("NonIndexed"));
    assert_eq!(spec.pod_replacement_policy.as_deref(), Some("TerminatingOrFailed"));
    let queue = job(json!({"spec": {"parallelism": 3}})).spec.unwrap();
    assert_eq!((queue.parallelism, queue.completions), (Some(3), None), "a work queue");
    let rules = json!([{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]);
    let strict = job(json!({"spec": {"podFailurePolicy": {"rules": rules}}})).spec.unwrap();
    assert_eq!(strict.pod_replacement_policy.as_deref(), Some("Failed"));
    let patterns = strict.pod_failure_policy.unwrap().rules.remove(0).on_pod_conditions.unwrap();
    assert_eq!(patterns[0].status.as_deref(), Some("True"));
}

#[test]
fn each_wrong_field_is_named() {
    let spec = |spec: Value| json!({"spec": spec});
    let rule = |rule: Value| json!({"spec": {"podFailurePolicy": {"rules": [rule]}}});
    let codes = |codes: Value| json!({"spec": {"podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": codes}]}}});
    let success = |rule: Value| json!({"spec": {"completionMode": "Indexed", "completions": 4, "successPolicy": {"rules": [rule]}}});
    for (patch, cause) in [
        (
            spec(json!({"parallelism": -1})),
            "spec.parallelism: Invalid value: -1: must be greater than or equal to 0",
        ),
        (spec(json!({"backoffLimit": -1})), "spec.backoffLimit: Invalid value: -1"),
        (spec(json!({"completionMode": "X"})), "spec.completionMode: Unsupported value: \"X\""),
        (
            spec(json!({"completionMode": "Indexed", "parallelism": 2})),
            "spec.completions: Required value: when completion mode is Indexed",
        ),
        (
            spec(json!({"selector": {"matchLabels": {"a": "b"}}})),
            "spec.selector: Invalid value: {\"matchLabels\":{\"a\":\"b\",",
        ),
        (spec(json!({"manualSelector": true})), "spec.selector: Required value"),
        (
            spec(json!({"template": {"metadata": {"labels": {"controller-uid": "x"}}}})),
            "spec.template.metadata.labels[controller-uid]: Invalid value: \"x\": must be 'u'",
        ),
        (
            spec(json!({"template": {"spec": {"restartPolicy": "Always"}}})),
            "spec.template.spec.restartPolicy: Required value: valid values: \"OnFailure\", \"Never\"",
        ),
        (
            spec(json!({"template": {"spec": {"containers": [{"name": "c"}]}}})),
            "spec.template.spec.containers[0].image: Required value",
        ),
        (
            json!({"metadata": {"name": "a.b"}, "spec": {"completionMode": "Indexed", "completions": 2}}),
            "metadata.name: Invalid value: \"a.b\": will not able to create pod with invalid DNS label: a.b-1",
        ),
        (spec(json!({"managedBy": "a/b"})), "spec.managedBy: Forbidden: not served here"),
        (
            spec(json!({"maxFailedIndexes": 1})),
            "spec.maxFailedIndexes: Invalid value: 1: requires backoffLimitPerIndex",
        ),
        (
            spec(json!({"backoffLimitPerIndex": 1})),
            "spec.backoffLimitPerIndex: Invalid value: 1: requires indexed completion mode",
        ),
        (
            rule(json!({"action": "FailIndex"})),
            "spec.podFailurePolicy.rules[0].action: Invalid value: \"FailIndex\": requires the backoffLimitPerIndex",
        ),
        (
            rule(json!({"action": "Frob"})),
            "spec.podFailurePolicy.rules[0].action: Unsupported value: \"Frob\"",
        ),
        (
            rule(json!({"action": "Count"})),
            "spec.podFailurePolicy.rules[0]: Invalid value: {}: specifying one of",
        ),
        (
            codes(json!({"operator": "In", "values": [0]})),
            "spec.podFailurePolicy.rules[0].onExitCodes.values[0]: Invalid value: 0: must not be 0",
        ),
        (
            codes(json!({"operator": "In", "values": [3, 1]})),
            "spec.podFailurePolicy.rules[0].onExitCodes.values: Invalid value: [3, 1]: must be ordered",
        ),
        (
            codes(json!({"operator": "In", "values": [3], "containerName": "x"})),
            "spec.podFailurePolicy.rules[0].onExitCodes.containerName: Invalid value: \"x\": must be one of",
        ),
        (
            json!({"spec": {"podReplacementPolicy": "TerminatingOrFailed", "podFailurePolicy": {"rules": []}}}),
            "spec.podReplacementPolicy: Unsupported value: \"TerminatingOrFailed\": supported values: \"Failed\"",
        ),
        (
            spec(json!({"successPolicy": {"rules": [{"succeededCount": 1}]}})),
            "spec.successPolicy: Invalid value: {}: requires indexed completion mode",
        ),
        (success(json!({})), "spec.successPolicy.rules[0]: Required value: at least one of"),
        (
            success(json!({"succeededIndexes": "1-4"})),
            "spec.successPolicy.rules[0].succeededIndexes: Invalid value",
        ),
        (
            success(json!({"succeededIndexes": "1,2", "succeededCount": 3})),
            "spec.successPolicy.rules[0].succeededCount: Invalid value: 3",
        ),
    ] {
        let found = causes(patch);
        assert!(found.iter().any(|f| f.starts_with(cause)), "{cause}\n{found:#?}");
    }
    let good = json!({"operator": "NotIn", "values": [0, 3], "containerName": "c"});
    assert_eq!(causes(codes(good)), [""; 0]);
    assert_eq!(causes(success(json!({"succeededIndexes": "1-3", "succeededCount": 3}))), [""; 0]);
    assert_eq!(causes(json!({})), [""; 0]);
}

#[test]
fn what_pods_were_made_of_does_not_change() {
    let update = |old: Value, status: Value, new: Value| {
        let mut before = job(old.clone());
        before.status = serde_json::from_value(status).unwrap();
        let mut value = serde_json::to_value(&before).unwrap();
        json_patch::merge(&mut value["spec"], &new);
        let after: Job = serde_json::from_value(value).unwrap();
        let mut causes = Causes::default();
        after.validate_update(&before, &mut causes);
        causes.into_vec().into_iter().map(|c| c.field).collect::<Vec<_>>()
    };
    let begun = json!({"startTime": "2026-01-01T00:00:00Z"});
    let none = json!({});
    let template = json!({"template": {"spec": {"nodeSelector": {"disk": "ssd"}}}});
    let image = json!({"template": {"spec": {"containers": [{"name": "c", "image": "other"}]}}});
    let waits = json!({"spec": {"suspend": true}});
    for (old, status, new, fields) in [
        (
            &none,
            &begun,
            json!({"parallelism": 3, "backoffLimit": 1, "suspend": true, "activeDeadlineSeconds": 9, "ttlSecondsAfterFinished": 1}),
            vec![],
        ),
        (&none, &begun, template.clone(), vec!["spec.template"]),
        (&waits, &none, template.clone(), vec![]),
        (&waits, &begun, template, vec!["spec.template"]),
        (&waits, &none, image, vec!["spec.template"]),
        (&none, &begun, json!({"completions": 3}), vec!["spec.completions"]),
        (
            &json!({"spec": {"completionMode": "Indexed", "completions": 2}}),
            &begun,
            json!({"completions": 3, "parallelism": 3}),
            vec![],
        ),
        (&none, &begun, json!({"completionMode": "Indexed"}), vec!["spec.completionMode"]),
        (&none, &begun, json!({"podFailurePolicy": {"rules": []}}), vec!["spec.podFailurePolicy"]),
    ] {
        assert_eq!(update(old.clone(), status.clone(), new.clone()), fields, "{new}");
    }
}

fn cron_causes(spec: Value, name: &str) -> Vec<String> {
    let mut base = json!({"metadata": {"name": name, "namespace": "n"}, "spec": {"schedule": "@hourly",
        "jobTemplate": {"spec": patched(&json!({}))["spec"]}}});
    json_patch::merge(&mut base["spec"], &spec);
    let mut object: CronJob = serde_json::from_value(base).unwrap();
    object.set_defaults();
    let mut causes = Causes::default();
    object.validate(&mut causes);
    texts(causes)
}

#[test]
fn a_cron_job_says_when_and_what() {
    let job = |spec: Value| json!({"jobTemplate": {"spec": spec}});
    for (spec, cause) in [
        (json!({"schedule": ""}), "spec.schedule: Required value"),
        (
            json!({"schedule": "x"}),
            "spec.schedule: Invalid value: \"x\": expected exactly 5 fields, found 1",
        ),
        (
            json!({"schedule": "TZ=UTC 0 * * * *"}),
            "spec.schedule: Invalid value: \"TZ=UTC 0 * * * *\": cannot use TZ",
        ),
        (
            json!({"schedule": "@every 1m"}),
            "spec.schedule: Invalid value: \"@every 1m\": @every is not served here",
        ),
        (
            json!({"timeZone": "Mars/Base"}),
            "spec.timeZone: Invalid value: \"Mars/Base\": unknown time zone",
        ),
        (json!({"timeZone": ""}), "spec.timeZone: Invalid value: \"\": timeZone must be nil"),
        (json!({"concurrencyPolicy": "X"}), "spec.concurrencyPolicy: Unsupported value: \"X\""),
        (json!({"startingDeadlineSeconds": -1}), "spec.startingDeadlineSeconds: Invalid value: -1"),
        (json!({"failedJobsHistoryLimit": -1}), "spec.failedJobsHistoryLimit: Invalid value: -1"),
        (job(json!({"parallelism": -1})), "spec.jobTemplate.spec.parallelism: Invalid value: -1"),
        (
            job(json!({"manualSelector": true})),
            "spec.jobTemplate.spec.manualSelector: Unsupported value: true",
        ),
        (
            job(json!({"selector": {}})),
            "spec.jobTemplate.spec.selector: Invalid value: {}: `selector` will be",
        ),
        (
            job(json!({"template": {"spec": {"restartPolicy": "Always"}}})),
            "spec.jobTemplate.spec.template.spec.restartPolicy: Required value",
        ),
        (job(json!(null)), "spec.jobTemplate.spec: Required value"),
    ] {
        let found = cron_causes(spec, "c");
        assert!(found.iter().any(|f| f.starts_with(cause)), "{cause}\n{found:#?}");
    }
    assert_eq!(cron_causes(json!({"timeZone": "UTC"}), &"c".repeat(52)), [""; 0]);
    let long = cron_causes(json!({}), &"c".repeat(53));
    assert!(long[0].ends_with("must be no more than 52 characters"), "{long:?}");
}

#[test]
fn a_cron_job_leaves_the_defaults_of_jobs_to_its_jobs() {
    let rules = json!([{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]);
    let spec = json!({"podFailurePolicy": {"rules": rules}, "template": patched(&json!({}))["spec"]["template"]});
    let mut object: CronJob = serde_json::from_value(
        json!({"spec": {"schedule": "@hourly", "jobTemplate": {"spec": spec}}}),
    )
    .unwrap();
    object.set_defaults();
    let job = object.spec.job_template.spec.unwrap();
    assert_eq!((job.completions, job.parallelism, job.backoff_limit), (None, None, None));
    assert_eq!((job.pod_replacement_policy, job.completion_mode), (None, None));
    let patterns = job.pod_failure_policy.unwrap().rules.remove(0).on_pod_conditions.unwrap();
    assert_eq!(patterns[0].status.as_deref(), Some("True"));
    assert!(job.template.spec.unwrap().dns_policy.is_some());
}

#[test]
fn what_was_stored_with_a_fault_may_keep_it() {
    let object = |zone: &str, policy: &str| -> CronJob {
        let job = patched(&json!({}))["spec"].clone();
        serde_json::from_value(
            json!({"metadata": {"name": "c"}, "spec": {"schedule": "@hourly", "timeZone": zone,
            "concurrencyPolicy": policy, "jobTemplate": {"spec": job}}}),
        )
        .unwrap()
    };
    let stored = object("Mars/Base", "Allow");
    let update = |new: CronJob| {
        let mut causes = Causes::default();
        new.validate(&mut causes);
        causes.without_those_of(&stored);
        texts(causes).len()
    };
    assert_eq!(update(object("Mars/Base", "Forbid")), 0, "its zone was known once");
    assert_eq!((update(object("Mars/Moon", "Allow")), update(object("Mars/Base", "X"))), (1, 1));
}
