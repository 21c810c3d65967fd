use proptest::prelude::*;

use super::*;

const TICK: Duration = Duration::from_millis(100);
const CEILING: u16 = 1420;

/// A way that carries packets up to a size, and acknowledges each after a while.
struct Way {
    now: Instant,
    begun: Instant,
    mtu: PathMtu,
    carries: u16,
    round_trip: Duration,
    /// Of a hundred.
    lost: u64,
    random: u64,
    probes: usize,
    under_way: Vec<(Instant, Probe)>,
}

impl Way {
    fn new(ceiling: u16, carries: u16) -> Self {
        let now = Instant::now();
        let mut mtu = PathMtu::new(now, ceiling);
        mtu.set_way(now, Some(([192, 0, 2, 1], 51900).into()));
        let round_trip = Duration::from_millis(20);
        let under_way = vec![];
        Self { now, begun: now, mtu, carries, round_trip, lost: 0, random: 1, probes: 0, under_way }
    }

    /// Lets time pass; the largest packet that was allowed meanwhile.
    fn run(&mut self, time: Duration, large: bool) -> u16 {
        let (end, mut largest) = (self.now + time, 0);
        while self.now < end {
            self.now += TICK;
            let now = self.now;
            for (at, probe) in std::mem::take(&mut self.under_way) {
                if at <= now {
                    self.mtu.acknowledged(at, probe)
                } else {
                    self.under_way.push((at, probe))
                }
            }
            for probe in self.mtu.poll(now, large).into_iter().flatten() {
                self.probes += 1;
                self.random ^= self.random << 13;
                self.random ^= self.random >> 7;
                self.random ^= self.random << 17;
                if probe.size <= self.carries && self.random % 100 >= self.lost {
                    self.under_way.push((now + self.round_trip, probe));
                }
            }
            largest = largest.max(self.mtu.mtu());
            assert!((FLOOR..=self.mtu.ceiling).contains(&self.mtu.mtu()));
        }
        largest
    }

    fn secs(&mut self, secs: u64) -> u16 {
        self.run(Duration::from_secs(secs), true)
    }
}

#[test]
fn a_wide_way_is_tested_once_and_then_while_it_is_used() {
    let mut way = Way::new(CEILING, 1500);
    way.run(Duration::from_secs(600), false);
    assert_eq!((way.mtu.mtu(), way.mtu.narrow(), way.probes), (CEILING, None, 1), "idle");
    way.probes = 0;
    way.secs(60);
    assert!((15..=21).contains(&way.probes), "{} probes in a minute", way.probes);
    assert_eq!(way.mtu.mtu(), CEILING);
}

#[test]
fn a_way_that_is_narrow_from_the_start_is_found_within_two_seconds_and_measured_soon() {
    let mut way = Way::new(CEILING, 1340);
    way.run(Duration::from_secs(2), false);
    assert!(way.mtu.mtu() <= 1340, "{way:?}", way = way.mtu);
    way.run(Duration::from_secs(5), false);
    assert!((1340 - STEP..=1340).contains(&way.mtu.mtu()), "{:?}", way.mtu);
    let mut jumbo = Way::new(8920, 1420);
    jumbo.secs(10);
    assert!((1420 - STEP..=1420).contains(&jumbo.mtu.mtu()), "{:?}", jumbo.mtu);
}

#[test]
fn a_black_hole_is_noticed_and_left_when_it_is_gone() {
    let mut way = Way::new(CEILING, CEILING);
    way.secs(10);
    way.carries = 1388;
    way.secs(6);
    assert!(way.mtu.mtu() <= 1388, "{:?}", way.mtu);
    way.secs(6);
    let found = way.mtu.mtu();
    assert!((1388 - STEP..=1388).contains(&found), "{:?}", way.mtu);
    assert!(way.secs(200) <= 1388, "looking for more lets nothing larger pass");
    way.carries = 1500;
    way.secs(70);
    assert_eq!(way.mtu.mtu(), CEILING, "{:?}", way.mtu);
}

#[test]
fn a_router_is_believed_when_probes_agree_and_not_otherwise() {
    let mut way = Way::new(CEILING, CEILING);
    way.secs(5);
    way.mtu.hint(way.now, 1300);
    assert_eq!(way.secs(30), CEILING, "a forged message");
    assert_eq!(way.mtu.mtu(), CEILING);
    way.mtu.hint(way.now, CEILING);
    way.carries = 1340;
    way.mtu.hint(way.now, 1340);
    way.run(Duration::from_secs(1), true);
    assert_eq!(way.mtu.mtu(), 1340, "at once, and to the byte: {:?}", way.mtu);
    way.secs(30);
    assert_eq!(way.mtu.mtu(), 1340);
    // What the system forgets or learns anew is looked at.
    way.carries = 1500;
    way.mtu.hint(way.now, CEILING);
    way.run(Duration::from_secs(1), true);
    assert_eq!(way.mtu.mtu(), CEILING, "{:?}", way.mtu);
}

#[test]
fn what_the_system_refuses_is_certain() {
    let mut way = Way::new(CEILING, 1340);
    way.mtu.limit(way.now, 1340);
    assert_eq!(way.mtu.narrow(), Some(1340));
    assert_eq!(way.secs(50), 1340);
    way.carries = 1500;
    way.mtu.hint(way.now, CEILING);
    way.secs(2);
    assert_eq!(way.mtu.mtu(), CEILING);
}

#[test]
fn a_peer_that_knows_no_probes_is_left_alone() {
    let mut way = Way::new(CEILING, 0);
    way.secs(3600);
    assert_eq!(way.mtu.mtu(), CEILING);
    assert!(way.probes < 100, "{} probes in an hour", way.probes);
}

#[test]
fn another_way_is_tested_anew() {
    let mut way = Way::new(CEILING, 1300);
    way.secs(10);
    let found = way.mtu.mtu();
    assert!(found <= 1300);
    way.mtu.set_way(way.now, Some(([192, 0, 2, 9], 51901).into()));
    assert_eq!(way.mtu.mtu(), found, "until it is known");
    way.carries = 1500;
    way.run(Duration::from_secs(3), false);
    assert_eq!(way.mtu.mtu(), CEILING, "{:?}", way.mtu);
    way.mtu.set_ceiling(way.now, 1320);
    assert_eq!((way.mtu.mtu(), way.mtu.narrow()), (1320, None));
}

proptest! {
    #[test]
    fn what_a_way_carries_is_found_whatever_it_is_and_loses(
        carries in FLOOR..2000u16,
        ceiling in prop_oneof![Just(1420u16), Just(1340), Just(8920)],
        round_trip in 1u64..900,
        lost in 0u64..8,
        random in 1u64..u64::MAX,
        changed in FLOOR..9000u16,
    ) {
        let mut way = Way::new(ceiling, carries);
        way.round_trip = Duration::from_millis(round_trip);
        way.secs(60);
        let most = carries.min(ceiling);
        let found = way.mtu.mtu();
        prop_assert!(found <= most && most - found <= STEP.max(4) + 4, "{found} of {most}: {:?}", way.mtu);
        // With losses it may be taken for less for a while, never for more.
        (way.lost, way.random, way.carries) = (lost, random, changed);
        way.secs(200);
        let most = changed.min(ceiling);
        prop_assert!(way.mtu.mtu() <= most, "{} of {most}: {:?}", way.mtu.mtu(), way.mtu);
        way.lost = 0;
        way.secs(150);
        let found = way.mtu.mtu();
        prop_assert!(found <= most && most - found <= STEP.max(4) + 4, "{found} of {most}: {:?}", way.mtu);
        prop_assert!(way.now > way.begun);
    }
}
