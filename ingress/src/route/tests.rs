use proptest::prelude::*;

use super::*;

fn rule(host: &str, path: PathMatch, target: &'static str) -> Rule<&'static str> {
    Rule { host: (!host.is_empty()).then(|| host.to_owned()), path, target }
}

fn exact(path: &str) -> PathMatch {
    PathMatch::Exact(path.into())
}

fn prefix(path: &str) -> PathMatch {
    PathMatch::Prefix(path.into())
}

#[test]
fn the_examples_of_ingress_v1_hold() {
    // (kind and paths, request path, match), from the table "Examples" of the Ingress documentation.
    let cases: &[(&[PathMatch], &str, Option<usize>)] = &[
        (&[prefix("/")], "/anything", Some(0)),
        (&[exact("/foo")], "/foo", Some(0)),
        (&[exact("/foo")], "/bar", None),
        (&[exact("/foo")], "/foo/", None),
        (&[exact("/foo/")], "/foo", None),
        (&[prefix("/foo")], "/foo/", Some(0)),
        (&[prefix("/foo/")], "/foo", Some(0)),
        (&[prefix("/foo/")], "/foo/", Some(0)),
        (&[prefix("/aaa/bb")], "/aaa/bbb", None),
        (&[prefix("/aaa/bbb")], "/aaa/bbb", Some(0)),
        (&[prefix("/aaa/bbb/")], "/aaa/bbb", Some(0)),
        (&[prefix("/aaa/bbb")], "/aaa/bbb/", Some(0)),
        (&[prefix("/aaa/bbb")], "/aaa/bbb/ccc", Some(0)),
        (&[prefix("/aaa/bbb")], "/aaa/bbbxyz", None),
        (&[prefix("/"), prefix("/aaa")], "/aaa/ccc", Some(1)),
        (&[prefix("/"), prefix("/aaa"), prefix("/aaa/bbb")], "/aaa/bbb", Some(2)),
        (&[prefix("/"), prefix("/aaa"), prefix("/aaa/bbb")], "/ccc", Some(0)),
        (&[prefix("/aaa")], "/ccc", None),
        (&[prefix("/foo"), exact("/foo")], "/foo", Some(1)),
    ];
    for (paths, request, expected) in cases {
        let rules = paths.iter().enumerate().map(|(target, path)| Rule {
            host: None,
            path: path.clone(),
            target,
        });
        let (table, invalid) = RouteTable::new(rules);
        assert!(invalid.is_empty());
        assert_eq!(table.find("h", request.as_bytes()).copied(), *expected, "{paths:?} {request}");
    }
}

#[test]
fn a_host_beats_its_wildcard_beats_any_and_falls_through() {
    let (table, invalid) = RouteTable::new([
        rule("", prefix("/"), "default"),
        rule("*.foo.com", prefix("/"), "wild"),
        rule("*.foo.com", exact("/only"), "wild-only"),
        rule("Bar.foo.COM", prefix("/bar"), "exact"),
    ]);
    assert!(invalid.is_empty());
    for (host, path, expected) in [
        ("bar.foo.com", "/bar/x", "exact"),
        ("bar.foo.com", "/other", "wild"),
        ("bar.foo.com", "/only", "wild-only"),
        ("x.foo.com", "/bar", "wild"),
        ("baz.bar.foo.com", "/", "default"),
        ("foo.com", "/", "default"),
        ("", "/", "default"),
    ] {
        assert_eq!(table.find(host, path.as_bytes()), Some(&expected), "{host}{path}");
    }
}

#[test]
fn a_bad_rule_is_named_and_leaves_the_others() {
    let (table, invalid) = RouteTable::new([
        rule("a.b", prefix("/"), "first"),
        rule("*", prefix("/"), "x"),
        rule("a.*.b", prefix("/"), "x"),
        rule("a.b:80", prefix("/"), "x"),
        rule("a b", prefix("/"), "x"),
        rule("a.b", prefix("relative"), "x"),
        rule("a.b", prefix("/"), "second"),
    ]);
    assert_eq!(table.find("a.b", b"/"), Some(&"first"));
    let indexes: Vec<_> = invalid.iter().map(|(index, _)| *index).collect();
    assert_eq!(indexes, [1, 2, 3, 4, 5, 6]);
    assert_eq!(invalid[5].1, InvalidRule::Taken);
}

/// The rules as sentences: all that match, then the best by (host, exactness, length).
fn reference(rules: &[Rule<usize>], host: &str, path: &str) -> Option<usize> {
    let host_rank = |rule: &Rule<usize>| match rule.host.as_deref() {
        None => Some(0),
        Some(name) => match name.strip_prefix("*.") {
            Some(suffix) => {
                let (label, rest) = host.split_once('.')?;
                (!label.is_empty() && rest == suffix).then_some(1)
            }
            None => (name == host).then_some(2),
        },
    };
    let elements = |text: &str| {
        let mut parts: Vec<_> = text.split('/').skip(1).map(str::to_owned).collect();
        while parts.last().is_some_and(String::is_empty) {
            parts.pop();
        }
        parts
    };
    let path_rank = |rule: &Rule<usize>| match &rule.path {
        PathMatch::Exact(p) => (p == path).then_some((1, 0)),
        PathMatch::Prefix(p) => {
            let (wanted, all) = (elements(p), path.split('/').skip(1).map(str::to_owned));
            let all: Vec<_> = all.collect();
            all.starts_with(&wanted).then_some((0, wanted.len()))
        }
    };
    type Rank = (i32, (i32, usize));
    let mut best: Option<(Rank, usize)> = None;
    for rule in rules {
        let Some(rank) = host_rank(rule).zip(path_rank(rule)) else { continue };
        if best.is_none_or(|(old, _)| rank > old) {
            best = Some((rank, rule.target));
        }
    }
    best.map(|(_, target)| target)
}

proptest! {
    #[test]
    fn the_table_agrees_with_the_sentences(
        rules in prop::collection::vec(
            (prop::option::of("(\\*\\.)?[ab]{1}(\\.[ab]){0,2}"), any::<bool>(), "(/[ab]{0,1}){1,4}"), 0..12),
        requests in prop::collection::vec(("[ab](\\.[ab]){0,3}", "(/[ab]{0,1}){1,5}"), 1..12),
    ) {
        let rules: Vec<_> = rules.into_iter().enumerate().map(|(target, (host, is_exact, path))| Rule {
            host,
            path: if is_exact { PathMatch::Exact(path) } else { PathMatch::Prefix(path) },
            target,
        }).collect();
        let (table, _) = RouteTable::new(rules.clone());
        for (host, path) in requests {
            prop_assert_eq!(
                table.find(&host, path.as_bytes()).copied(),
                reference(&rules, &host, &path),
                "{}{}", host, path);
        }
    }
}
