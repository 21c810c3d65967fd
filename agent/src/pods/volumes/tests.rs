use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt as _, symlink};

use super::*;
use crate::pods::env::environment;
use crate::pods::tests::options;

fn work(spec: serde_json::Value) -> PodWork {
    let pod = serde_json::json!({"metadata": {"name": "web", "namespace": "shop", "labels": {"app": "web"}}, "spec": spec});
    let values = |pairs: &[(&str, &str)]| -> BTreeMap<String, Vec<u8>> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), v.as_bytes().to_vec())).collect()
    };
    PodWork {
        pod: serde_json::from_value(pod).unwrap(),
        config_maps: [("settings".to_owned(), values(&[("a.conf", "one"), ("b.conf", "two")]))]
            .into(),
        binary_keys: Default::default(),
        secrets: [("keys".to_owned(), values(&[("token", "s3cret")]))].into(),
        service_env: BTreeMap::new(),
        departure: None,
    }
}

fn spec() -> serde_json::Value {
    serde_json::json!({
    "containers": [{"name": "c", "env": [{"name": "POD", "value": "web-0"}, {"name": "EMPTY"}], "volumeMounts": [
        {"name": "cfg", "mountPath": "/etc/app"},
        {"name": "cfg", "mountPath": "/etc/one", "subPath": "a.conf"},
        {"name": "scratch", "mountPath": "tmp", "subPathExpr": "x/$(POD)"},
        {"name": "host", "mountPath": "/host", "readOnly": true}]}],
    "volumes": [
        {"name": "cfg", "configMap": {"name": "settings"}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "host", "hostPath": {"path": "/tmp", "type": "Directory"}},
        {"name": "all", "projected": {"defaultMode": 0o440, "sources": [
            {"secret": {"name": "keys", "items": [{"key": "token", "path": "deep/token", "mode": 0o400}]}},
            {"configMap": {"name": "settings"}},
            {"configMap": {"name": "gone", "optional": true}},
            {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}}]}}
    ]})
}

fn layout(directory: &Path) -> Layout {
    Layout::new(&options(directory.to_str().unwrap()))
}

#[test]
fn files_are_written_switched_and_removed() {
    let directory = tempfile::tempdir().unwrap();
    let layout = layout(directory.path());
    let mut work = work(spec());
    prepare(&work, "u1", &Facts::default(), &layout).unwrap();
    let cfg = layout.volume("u1", "cfg", false);
    let all = layout.volume("u1", "all", true);
    let text = |path: &Path| std::fs::read_to_string(path).unwrap();
    assert_eq!(text(&cfg.join("a.conf")), "one");
    assert_eq!(text(&all.join("deep/token")), "s3cret");
    assert_eq!(text(&all.join("labels")), "app=\"web\"");
    assert_eq!(std::fs::metadata(all.join("deep/token")).unwrap().mode() & 0o777, 0o400);
    assert_eq!(std::fs::metadata(all.join("a.conf")).unwrap().mode() & 0o777, 0o440);
    let before = std::fs::read_link(cfg.join("..data")).unwrap();

    prepare(&work, "u1", &Facts::default(), &layout).unwrap();
    assert_eq!(std::fs::read_link(cfg.join("..data")).unwrap(), before, "nothing changed");

    let settings = work.config_maps.get_mut("settings").unwrap();
    settings.insert("a.conf".to_owned(), b"changed".to_vec());
    settings.remove("b.conf");
    prepare(&work, "u1", &Facts::default(), &layout).unwrap();
    assert_eq!(text(&cfg.join("a.conf")), "changed");
    assert!(!cfg.join("b.conf").exists() && cfg.join("b.conf").symlink_metadata().is_err());
    assert!(!cfg.join(before).exists(), "the old version is deleted");

    for path in layout.pod("u1") {
        clean(&path).unwrap();
        assert!(!path.exists());
    }
}

#[test]
fn a_volume_that_cannot_be_brought_up_to_date_does_not_keep_the_others_back() {
    let directory = tempfile::tempdir().unwrap();
    let layout = layout(directory.path());
    let mut work = work(spec());
    prepare(&work, "u1", &Facts::default(), &layout).unwrap();
    work.config_maps.clear();
    let all = &mut work.pod.spec.as_mut().unwrap().volumes.as_mut().unwrap()[3];
    let optional = all.projected.as_mut().unwrap().sources.as_mut().unwrap()[1].config_map.as_mut();
    optional.unwrap().optional = Some(true);
    work.secrets.get_mut("keys").unwrap().insert("token".to_owned(), b"renewed".to_vec());
    let error = prepare(&work, "u1", &Facts::default(), &layout).unwrap_err().to_string();
    assert_eq!(error, "volume \"cfg\": ConfigMap \"settings\" not found");
    let token = layout.volume("u1", "all", true).join("deep/token");
    assert_eq!(std::fs::read_to_string(token).unwrap(), "renewed");
    let kept = layout.volume("u1", "cfg", false).join("a.conf");
    assert_eq!(std::fs::read_to_string(kept).unwrap(), "one", "what is in use stays");
}

#[test]
fn files_of_a_group_are_not_written_again_without_a_reason() {
    let directory = tempfile::tempdir().unwrap();
    let layout = layout(directory.path());
    let mut spec = spec();
    spec["securityContext"] = serde_json::json!({"fsGroup": nix::unistd::getegid().as_raw()});
    let work = work(spec);
    prepare(&work, "u1", &Facts::default(), &layout).unwrap();
    let all = layout.volume("u1", "all", true);
    assert_eq!(std::fs::metadata(all.join("deep/token")).unwrap().mode() & 0o777, 0o440);
    let before = std::fs::read_link(all.join("..data")).unwrap();
    prepare(&work, "u1", &Facts::default(), &layout).unwrap();
    assert_eq!(std::fs::read_link(all.join("..data")).unwrap(), before);
}

#[test]
fn a_token_is_for_those_that_the_pod_runs_as() {
    if !may_mount() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let layout = layout(directory.path());
    let token = serde_json::json!({"path": "token"});
    let kind = crate::pods::tokens::kind(&serde_json::from_value(token.clone()).unwrap());
    let facts = Facts { tokens: [(kind, Ok("t".to_owned()))].into(), ..Facts::default() };
    let mut pods = 0;
    let mut found = |pod: serde_json::Value, containers: [serde_json::Value; 2]| {
        let [first, second] =
            containers.map(|context| serde_json::json!({"name": "c", "securityContext": context}));
        let work = work(serde_json::json!({
            "securityContext": pod, "initContainers": [first], "containers": [second],
            "volumes": [{"name": "v", "projected": {"defaultMode": 0o400, "sources": [
                {"serviceAccountToken": token}, {"configMap": {"name": "settings"}}]}}]}));
        pods += 1;
        let uid = format!("u{pods}");
        prepare(&work, &uid, &facts, &layout).unwrap();
        let volume = layout.volume(&uid, "v", true);
        let written = std::fs::read_link(volume.join("..data")).unwrap();
        prepare(&work, &uid, &facts, &layout).unwrap();
        assert_eq!(std::fs::read_link(volume.join("..data")).unwrap(), written, "nothing changed");
        let of = |name: &str| {
            let file = std::fs::metadata(volume.join(name)).unwrap();
            (file.uid(), file.gid(), file.mode() & 0o777)
        };
        (of("token"), of("a.conf"))
    };
    let none = || serde_json::json!({});
    let user = |id: u32| serde_json::json!({"runAsUser": id});
    let root_only = (0, 0, 0o400);
    assert_eq!(found(none(), [none(), none()]), (root_only, root_only), "as it is asked for");
    assert_eq!(found(user(1000), [none(), none()]), ((1000, 0, 0o600), root_only));
    assert_eq!(found(none(), [user(7), user(7)]), ((7, 0, 0o600), root_only));
    assert_eq!(found(user(1000), [none(), user(7)]), (root_only, root_only), "two users");
    assert_eq!(found(none(), [user(7), none()]), (root_only, root_only), "the image decides");
    let grouped = (0, 2000, 0o440);
    let group = serde_json::json!({"fsGroup": 2000});
    assert_eq!(found(group, [none(), none()]), ((0, 2000, 0o640), grouped));
    let both = serde_json::json!({"fsGroup": 2000, "runAsUser": 1000});
    assert_eq!(found(both, [none(), none()]), ((1000, 2000, 0o640), grouped));
}

#[test]
fn a_sub_path_that_names_no_file_does_not_stop_updates() {
    let directory = tempfile::tempdir().unwrap();
    let layout = layout(directory.path());
    let mut work = work(spec());
    prepare(&work, "u1", &Facts::default(), &layout).unwrap();
    let cfg = layout.volume("u1", "cfg", false);
    Part::open(&cfg, "late.conf").unwrap();
    let text = |name: &str| std::fs::read_to_string(cfg.join(name)).unwrap();
    let settings = work.config_maps.get_mut("settings").unwrap();
    settings.insert("a.conf".to_owned(), b"changed".to_vec());
    prepare(&work, "u1", &Facts::default(), &layout).unwrap();
    assert_eq!((text("a.conf").as_str(), cfg.join("late.conf").is_dir()), ("changed", true));
    let settings = work.config_maps.get_mut("settings").unwrap();
    settings.insert("late.conf".to_owned(), b"here".to_vec());
    prepare(&work, "u1", &Facts::default(), &layout).unwrap();
    assert_eq!(text("late.conf"), "here");
}

#[test]
fn mounts_point_into_the_volumes() {
    let directory = tempfile::tempdir().unwrap();
    let layout = layout(directory.path());
    let work = work(spec());
    prepare(&work, "u1", &Facts::default(), &layout).unwrap();
    let spec = work.pod.spec.as_ref().unwrap();
    let environment = environment(&work, &spec.containers[0], &Facts::default()).unwrap();
    if !may_mount() {
        return;
    }
    let directory = Cleaned(directory);
    let mounts = container_mounts(spec, &spec.containers[0], "u1", &environment, &layout).unwrap();
    let paths: Vec<(&str, bool)> =
        mounts.iter().map(|m| (m.container_path.as_str(), m.readonly)).collect();
    assert_eq!(paths, [("/etc/app", true), ("/etc/one", true), ("/tmp", false), ("/host", true)]);
    assert_eq!(std::fs::read_to_string(&mounts[1].host_path).unwrap(), "one");
    std::fs::write(Path::new(&mounts[2].host_path).join("f"), "two").unwrap();
    let scratch = layout.volume("u1", "scratch", false);
    assert_eq!(std::fs::read_to_string(scratch.join("x/web-0/f")).unwrap(), "two");

    // The next run of the container gets the same, and nothing piles up.
    container_mounts(spec, &spec.containers[0], "u1", &environment, &layout).unwrap();
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let root = directory.0.path().to_str().unwrap();
    assert_eq!(table.lines().filter(|line| line.contains(root)).count(), 2, "{table}");
    clean(directory.0.path()).unwrap();
    assert!(!directory.0.path().exists());
}

#[test]
fn a_part_that_depends_on_nothing_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let layout = layout(directory.path());
    let work = work(spec());
    prepare(&work, "u1", &Facts::default(), &layout).unwrap();
    let mut spec = work.pod.spec.clone().unwrap();
    let environment = environment(&work, &spec.containers[0], &Facts::default()).unwrap();
    for (expression, missing) in
        [("$(EMPTY)", "EMPTY"), ("a/$(NONE)", "NONE"), ("$(NONE)$(POD)$(EMPTY)", "NONE, EMPTY")]
    {
        let mounts = spec.containers[0].volume_mounts.as_mut().unwrap();
        *mounts = vec![VolumeMount {
            name: "scratch".to_owned(),
            mount_path: "/tmp".to_owned(),
            sub_path_expr: Some(expression.to_owned()),
            ..VolumeMount::default()
        }];
        let made = container_mounts(&spec, &spec.containers[0], "u1", &environment, &layout);
        let error = made.unwrap_err().to_string();
        assert!(error.ends_with(&format!("missing value for {missing}")), "{error}");
    }
    let scratch = layout.volume("u1", "scratch", false);
    assert_eq!(std::fs::read_dir(scratch).unwrap().count(), 0, "and nothing is made");
}

/// Unmounts what a test has mounted, also after a panic.
struct Cleaned(tempfile::TempDir);

impl Drop for Cleaned {
    fn drop(&mut self) {
        let _ = clean(self.0.path());
    }
}

fn may_mount() -> bool {
    let root = nix::unistd::geteuid().is_root();
    assert!(root || std::env::var_os("CI").is_none(), "mounting needs root");
    root
}

#[test]
fn memory_belongs_to_its_group_after_a_reboot_too() {
    if !may_mount() {
        return;
    }
    let directory = Cleaned(tempfile::tempdir().unwrap());
    let layout = layout(directory.0.path());
    let work = work(serde_json::json!({"containers": [], "securityContext": {"fsGroup": 4321},
        "volumes": [{"name": "m", "emptyDir": {"medium": "Memory"}}, {"name": "d", "emptyDir": {}}]}));
    let volume = |name: &str| layout.volume("u1", name, false);
    for boot in ["first", "next"] {
        prepare(&work, "u1", &Facts::default(), &layout).unwrap();
        for name in ["m", "d"] {
            let made = std::fs::metadata(volume(name)).unwrap();
            assert_eq!((made.gid(), made.mode() & 0o7777), (4321, 0o2777), "{name}, {boot} boot");
        }
        nix::mount::umount(&volume("m")).unwrap();
        // A directory of a disk that was made for the mount; whose it is does not matter.
        chown(volume("m"), None, Some(0)).unwrap();
    }
    let all = std::fs::read_dir(volume("m").parent().unwrap()).unwrap();
    assert_eq!(all.count(), 2, "nothing else is left");
}

#[test]
fn memory_is_no_larger_than_its_pod_may_be() {
    if !may_mount() {
        return;
    }
    let directory = Cleaned(tempfile::tempdir().unwrap());
    let layout = layout(directory.0.path());
    let mut pods = 0;
    let mut mebibytes = |container: &str, node: i64, size: serde_json::Value| {
        let work = work(serde_json::json!({
            "containers": [{"name": "c", "resources": {"limits": {"memory": container}}}],
            "volumes": [{"name": "m", "emptyDir": {"medium": "Memory", "sizeLimit": size}}]}));
        let facts = Facts { memory_bytes: node << 20, ..Facts::default() };
        pods += 1;
        let uid = format!("u{pods}");
        prepare(&work, &uid, &facts, &layout).unwrap();
        let made = nix::sys::statvfs::statvfs(&layout.volume(&uid, "m", false)).unwrap();
        (made.blocks() * made.fragment_size()) >> 20
    };
    assert_eq!(mebibytes("3Mi", 9, serde_json::Value::Null), 3);
    assert_eq!(mebibytes("3Mi", 9, "2Mi".into()), 2);
    assert_eq!(mebibytes("3Mi", 9, "4Mi".into()), 3);
    assert_eq!(mebibytes("0", 9, serde_json::Value::Null), 9, "what the node has");
    assert_eq!(mebibytes("0", 9, "0".into()), 9, "zero is no limit");
    assert_eq!(mebibytes("12Mi", 9, "10Mi".into()), 9);
}

#[test]
fn sub_paths_stay_inside_their_volume() {
    let directory = tempfile::tempdir().unwrap();
    let volume = directory.path().join("volume");
    std::fs::create_dir(&volume).unwrap();
    symlink("/etc", volume.join("out")).unwrap();
    symlink("..", volume.join("up")).unwrap();
    for bad in ["..", "/etc", "a/../..", "out", "out/passwd", "up/x", "up"] {
        let refused = matches!(Part::open(&volume, bad), Err(MountError::SubPath(_)));
        assert!(refused, "{bad}");
    }
    assert!(!directory.path().join("x").exists());
    symlink("new", volume.join("inside")).unwrap();
    assert!(
        Part::open(&volume, "new/./deep").is_ok() && Part::open(&volume, "inside/deep").is_ok()
    );
    assert!(volume.join("new/deep").is_dir());
}

#[test]
fn what_is_made_for_a_sub_path_is_as_open_as_its_volume() {
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o7777;
    for wanted in [0o2777, 0o777, 0o750] {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().join("volume");
        let own = volume.join("own");
        std::fs::create_dir_all(&own).unwrap();
        for (path, mode) in [(&volume, wanted), (&own, 0o700)] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        Part::open(&volume, "own/a/b").unwrap();
        for made in ["own/a", "own/a/b"] {
            assert_eq!(mode(&volume.join(made)), wanted, "{made} in a volume of {wanted:o}");
        }
        assert_eq!(mode(&own), 0o700, "what was there stays as it is");
    }
}

#[test]
fn a_part_that_is_exchanged_stays_what_it_was() {
    if !may_mount() {
        return;
    }
    let directory = Cleaned(tempfile::tempdir().unwrap());
    let (volume, place) = (directory.0.path().join("volume"), directory.0.path().join("place/0"));
    std::fs::create_dir_all(volume.join("data")).unwrap();
    std::fs::write(volume.join("data/own"), "").unwrap();
    let part = Part::open(&volume, "data").unwrap();
    // What a container may do between the check and the mount.
    std::fs::rename(volume.join("data"), volume.join("old")).unwrap();
    symlink("/etc", volume.join("data")).unwrap();
    part.mount(&place).unwrap();
    assert!(place.join("own").exists() && !place.join("passwd").exists());
    assert!(matches!(Part::open(&volume, "data"), Err(MountError::SubPath(_))));
}

#[test]
fn references_to_nothing_and_bad_paths_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let layout = layout(directory.path());
    let fails = |volume: serde_json::Value| {
        let work = work(serde_json::json!({"containers": [], "volumes": [volume]}));
        prepare(&work, "u1", &Facts::default(), &layout).unwrap_err().to_string()
    };
    for (volume, expected) in [
        (
            serde_json::json!({"name": "v", "configMap": {"name": "gone"}}),
            "ConfigMap \"gone\" not found",
        ),
        (
            serde_json::json!({"name": "v", "secret": {"secretName": "gone"}}),
            "Secret \"gone\" not found",
        ),
        (
            serde_json::json!({"name": "v", "configMap": {"name": "settings", "items": [{"key": "k", "path": "p"}]}}),
            "no key \"k\"",
        ),
        (
            serde_json::json!({"name": "v", "configMap": {"name": "settings", "items": [{"key": "a.conf", "path": "../p"}]}}),
            "must be relative",
        ),
        (
            serde_json::json!({"name": "v", "configMap": {"name": "settings", "items": [{"key": "a.conf", "path": "x/../../p"}]}}),
            "must be relative",
        ),
        (
            serde_json::json!({"name": "v", "hostPath": {"path": "/etc/hostname/x", "type": "File"}}),
            "is not a File",
        ),
        (serde_json::json!({"name": "v", "nfs": {"server": "s", "path": "/"}}), "not served"),
    ] {
        let error = fails(volume);
        assert!(error.contains(expected), "{error}");
    }
}
