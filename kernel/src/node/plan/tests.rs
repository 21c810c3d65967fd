use ipnet::IpNet;
use proptest::prelude::*;

use super::super::fake::apply;
use super::super::{Foreign, Masquerade, conflicts};
use super::*;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn desired(blocks: &[&str], own: &[&str]) -> Desired {
    Desired {
        local_addresses: ["169.254.20.10".parse().unwrap()].into(),
        overlay: "mesh-wg".parse().unwrap(),
        overlay_mtu: 1420,
        overlay_addresses: own.iter().map(|text| text.parse().unwrap()).collect(),
        remote_blocks: blocks.iter().map(|text| net(text)).collect(),
        block_mtus: [].into(),
        refused: [net("10.244.0.0/16"), net("fd10:244::/56")].into(),
        masquerade: Some(Masquerade {
            sources: [net("10.244.1.0/24")].into(),
            inside: [net("10.244.0.0/16")].into(),
        }),
    }
}

fn device(ifindex: u32) -> ObservedOverlay {
    ObservedOverlay {
        ifindex,
        mtu: 1500,
        up: false,
        addresses: ["10.9.9.9".parse().unwrap()].into(),
        program: false,
    }
}

fn after(mut observed: Observed, plan: &Plan) -> Observed {
    plan.steps.iter().for_each(|step| apply(&mut observed, step));
    observed
}

fn any_desired() -> impl Strategy<Value = Desired> {
    let blocks = prop::collection::btree_set(0..5_u8, 0..4);
    let own = prop::collection::btree_set(0..3_u8, 0..2);
    (blocks, own, any::<bool>()).prop_map(|(blocks, own, masquerade)| {
        let mut wanted = desired(&[], &[]);
        wanted.remote_blocks = blocks.iter().map(|n| net(&format!("10.244.{n}.0/24"))).collect();
        wanted.overlay_addresses = own.iter().map(|n| IpAddr::from([10, 244, *n, 1])).collect();
        wanted.masquerade = wanted.masquerade.filter(|_| masquerade);
        wanted
    })
}

fn any_observed() -> impl Strategy<Value = Observed> {
    (any_desired(), prop::option::of(1..4_u32), any::<bool>()).prop_map(|(old, index, sysctl)| {
        let mut start = Observed { overlay: index.map(device), ..Observed::default() };
        let value = if sysctl { "0" } else { "1" };
        start.sysctls.insert("net/ipv4/ip_forward".to_owned(), value.to_owned());
        let first = plan(&old, &start);
        let mut reached = after(start, &first);
        // The device is replaced by another one meanwhile.
        reached.overlay = reached.overlay.map(|d| ObservedOverlay { ifindex: d.ifindex + 1, ..d });
        reached
    })
}

proptest! {
    #[test]
    fn one_round_reaches_the_desired_state(wanted in any_desired(), start in any_observed()) {
        let reached = after(start.clone(), &plan(&wanted, &start));
        prop_assert_eq!(plan(&wanted, &reached), Plan::default());
        prop_assert_eq!(&reached.remote_blocks, &wanted.remote_blocks);
        prop_assert_eq!(&reached.masquerade, &wanted.masquerade);
        let ifindex = reached.overlay.as_ref().map_or(0, |d| d.ifindex);
        prop_assert_eq!(reached.overlay_ifindex, ifindex);
        prop_assert_eq!(&reached.routes, &desired_routes(&wanted, ifindex));
    }

    #[test]
    fn removal_leaves_nothing(start in any_observed()) {
        let reached = after(start.clone(), &removal(&start));
        prop_assert!(reached.routes.is_empty() && reached.remote_blocks.is_empty());
        prop_assert!(reached.local_addresses.is_empty() && !reached.table_exists);
        prop_assert_eq!(reached.overlay_ifindex, 0);
    }
}

#[test]
fn without_the_overlay_device_nothing_leaves_in_the_clear() {
    let wanted = desired(&["10.244.2.0/24"], &["10.244.1.1"]);
    let reached = after(Observed::default(), &plan(&wanted, &Observed::default()));
    assert!(reached.routes.iter().all(|route| route.kind == RouteKind::Refuse));
    assert_eq!(reached.routes.len(), 2);
    assert_eq!(reached.overlay_ifindex, 0);
}

#[test]
fn a_new_device_replaces_routes_instead_of_deleting_them() {
    let wanted = desired(&["10.244.2.0/24"], &["10.244.1.1"]);
    let start = Observed { overlay: Some(device(3)), ..Observed::default() };
    let mut state = after(start.clone(), &plan(&wanted, &start));
    state.overlay = Some(device(4));
    let steps = plan(&wanted, &state).steps;
    assert!(!steps.iter().any(|step| matches!(step, Step::DeleteRoute(_))), "{steps:?}");
    assert!(steps.contains(&Step::SetOverlayIfindex(4)));
}

#[test]
fn ranges_that_the_node_uses_itself_are_named() {
    let wanted = desired(&[], &[]);
    let with = |text: &str, on_link| {
        let foreign = [Foreign { destination: net(text), on_link }].into();
        conflicts(&wanted, &Observed { foreign, ..Observed::default() })
    };
    for (route, on_link) in [
        ("10.244.3.0/24", true),
        ("10.244.3.0/24", false),
        ("10.244.0.0/16", false),
        ("10.0.0.0/8", true),
    ] {
        let found = with(route, on_link);
        assert_eq!(found.len(), 1, "{route}");
        let text = found[0].to_string();
        assert!(text.contains("10.244.0.0/16") && text.contains(route), "{text}");
    }
    assert_eq!(with("fd10:244:0:7::/64", true).len(), 1);
    for (route, on_link) in [("10.0.0.0/8", false), ("192.168.0.0/16", true), ("fd00::/64", true)] {
        assert_eq!(with(route, on_link), [], "{route}");
    }
}
