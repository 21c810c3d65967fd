use proptest::prelude::*;

use super::*;

const NOON: Duration = Duration::from_secs(1_700_000_000);
const HOUR: Duration = Duration::from_secs(3600);
const SECOND: Duration = Duration::from_secs(1);

fn at(time: Duration) -> SystemTime {
    SystemTime::UNIX_EPOCH + time
}

/// What the kernel's device would say by a clock that shows this.
fn kernels(clock: Duration) -> Tai64n {
    let nanos = clock.subsec_nanos() >> 24 << 24;
    Tai64n::from_unix(Duration::new(clock.as_secs(), nanos))
}

#[test]
fn stamps_grow_also_when_the_clock_does_not() {
    let now = Instant::now();
    let stamps = Stamps::new(now, at(NOON), Kept::default());
    let (a, b) = (stamps.next(now), stamps.next(now));
    let c = stamps.next(now + SECOND);
    assert!(a < b && b < c, "{a:?} {b:?} {c:?}");
    assert_eq!(c, Tai64n::from_unix(NOON + SECOND - BEHIND));
    assert_eq!(c.0[..8], (0x4000_0000_0000_000a_u64 + 1_700_000_000).to_be_bytes());
}

#[test]
fn a_clock_that_goes_ahead_is_followed_once_that_is_stored() {
    let now = Instant::now();
    let stamps = Stamps::new(now, at(NOON), Kept::default());
    stamps.follow(now, at(NOON + HOUR));
    assert!(stamps.next(now) < Tai64n::from_unix(NOON + SECOND), "the next process does not know");
    let kept = stamps.to_store().unwrap();
    assert_eq!(kept.limit.unwrap().shown(now), NOON + HOUR + SLACK);
    assert!(stamps.next(now) < Tai64n::from_unix(NOON + SECOND), "nor now, it is being stored");
    stamps.to_store();
    assert_eq!(stamps.next(now), Tai64n::from_unix(NOON + HOUR - BEHIND));
    assert_eq!(stamps.kept().limit, kept.limit, "and no more is stored for it");
}

#[test]
fn a_clock_that_is_set_back_is_waited_for_by_all_processes_to_come() {
    let now = Instant::now();
    let stamps = Stamps::new(now, at(NOON + HOUR), Kept::default());
    let highest = stamps.next(now);
    for wrong in [at(NOON), SystemTime::UNIX_EPOCH - HOUR] {
        stamps.follow(now, wrong);
        stamps.to_store();
        assert!(stamps.next(now) > highest);
        assert!(stamps.next(now + SECOND) < Tai64n::from_unix(NOON + HOUR + SECOND / 10));
    }
    // Killed a second later, and again half an hour after that.
    let [first, second] = [now + SECOND, now + HOUR / 2];
    let next = Stamps::new(first, at(NOON + SECOND), stamps.kept());
    let given = next.next(first);
    assert!(given > stamps.next(first));
    let last = Stamps::new(second, at(NOON + HOUR / 2), next.kept());
    assert!(last.next(second) > next.next(second));
    // When the clock has caught up, the others count again, and the next process is not ahead of it.
    let caught_up = now + HOUR * 2;
    last.follow(caught_up, at(NOON + HOUR * 2));
    assert_eq!(last.next(caught_up), Tai64n::from_unix(NOON + HOUR * 2 - BEHIND));
    let kept = last.to_store().unwrap();
    assert_eq!(kept.limit.unwrap().shown(caught_up), NOON + HOUR * 2 + SLACK);
    assert_eq!(last.to_store(), None, "not each time");
}

#[test]
fn a_machine_that_starts_anew_with_its_clock_set_back_goes_on_above() {
    let now = Instant::now();
    let before = Stamps::new(now, at(NOON), Kept::default());
    before.next(now);
    let stored = before.to_store().expect("nothing is stored yet");
    assert_eq!(before.to_store(), None, "not each time");
    let last = before.next(now + SECOND * 14);
    assert_eq!(before.to_store(), None);
    assert!(last < Tai64n::from_unix(stored.bound));

    let rebooted = Kept { limit: None, ..stored };
    let after = Stamps::new(now, at(NOON - HOUR), rebooted);
    assert!(after.next(now) > last);
    let stored_again = after.to_store().expect("the bound moves ahead of the stamps");
    assert!(stored_again.bound > stored.bound);
    assert!(after.next(now + SECOND * 9) < Tai64n::from_unix(stored_again.bound));
    let killed = Stamps::new(now + SECOND * 9, at(NOON - HOUR), after.kept());
    assert!(killed.next(now + SECOND * 9) > after.next(now + SECOND * 9));
}

#[test]
fn the_kernels_device_is_newer_than_a_process_that_was_killed_a_moment_before() {
    let start = Instant::now();
    let mut kept = Kept::default();
    for round in 0..200u32 {
        // At all places between two of the kernel's.
        let now = start + Duration::from_micros(100_137) * round;
        let clock = NOON + (now - start);
        let stamps = Stamps::new(now, at(clock), kept);
        stamps.next(now);
        let later = now + BEHIND + SLACK * 2;
        stamps.follow(later, at(clock + (later - now)));
        stamps.to_store();
        let given = stamps.next(later);
        assert!(kernels(clock + (later - now)) > given, "round {round}");
        assert!(Stamps::new(later, at(clock + (later - now)), kept).next(later) > kernels(clock));
        kept = stamps.kept();
    }
}

/// What befalls a node.
#[derive(Debug, Clone)]
enum Fate {
    Passes {
        millis: u32,
    },
    ClockIsSet {
        by_millis: i32,
    },
    Calls,
    /// The disk has stored what it was given, or has failed to.
    Looks {
        stored: bool,
    },
    IsKilled,
    HandsOver,
    MachineStartsAnew,
}

fn fates() -> impl Strategy<Value = Vec<Fate>> {
    let fate = prop_oneof![
        (0u32..40_000).prop_map(|millis| Fate::Passes { millis }),
        (-7_200_000i32..7_200_000).prop_map(|by_millis| Fate::ClockIsSet { by_millis }),
        Just(Fate::Calls),
        Just(Fate::Calls),
        any::<bool>().prop_map(|stored| Fate::Looks { stored }),
        Just(Fate::IsKilled),
        Just(Fate::HandsOver),
        Just(Fate::MachineStartsAnew),
    ];
    prop::collection::vec(fate, 1..80)
}

proptest! {
    #[test]
    fn no_process_gives_a_stamp_that_is_not_newer_than_all_before(fates in fates()) {
        let mut now = Instant::now();
        let mut clock = NOON;
        let mut disk = Kept::default();
        let begin = |now, clock, disk: &mut Kept| {
            let stamps = Stamps::new(now, at(clock), *disk);
            *disk = stamps.kept();
            stamps
        };
        let mut stamps = begin(now, clock, &mut disk);
        let mut newest = Tai64n::default();
        // What the process has asked for, and the disk has not done yet.
        let mut asked: Option<Kept> = None;
        for fate in fates {
            match fate {
                Fate::Passes { millis } => {
                    let passed = Duration::from_millis(millis.into());
                    (now, clock) = (now + passed, clock + passed);
                }
                Fate::ClockIsSet { by_millis } => {
                    let by = Duration::from_millis(by_millis.unsigned_abs().into());
                    clock = if by_millis < 0 { clock - by } else { clock + by };
                }
                Fate::Calls => {
                    let stamp = stamps.next(now);
                    prop_assert!(stamp > newest);
                    newest = stamp;
                    now += Duration::from_micros(2);
                    clock += Duration::from_micros(2);
                }
                Fate::Looks { stored } => {
                    stamps.follow(now, at(clock));
                    if stored {
                        disk = asked.take().unwrap_or(disk);
                        asked = stamps.to_store();
                    }
                }
                Fate::IsKilled => {
                    asked = None;
                    stamps = begin(now, clock, &mut disk);
                }
                Fate::HandsOver => {
                    disk = asked.take().unwrap_or(disk);
                    let last = stamps.last();
                    stamps = Stamps::new(now, at(clock), disk).after(now, last);
                    disk = stamps.kept();
                }
                Fate::MachineStartsAnew => {
                    // Nothing was called since the last look, which has been stored.
                    disk = stamps.to_store().unwrap_or(asked.take().unwrap_or(disk));
                    asked = None;
                    disk.limit = None;
                    stamps = begin(now, clock, &mut disk);
                }
            }
        }
    }

    #[test]
    fn stamps_are_never_ahead_of_a_clock_that_is_right(
        lives in prop::collection::vec(prop::collection::vec(0u32..60_000, 0..6), 1..8),
    ) {
        let start = Instant::now();
        let mut now = start;
        let mut kept = Kept::default();
        let clock = |now: Instant| NOON + (now - start);
        for life in lives {
            let stamps = Stamps::new(now, at(clock(now)), kept);
            kept = stamps.kept();
            for pause in life {
                stamps.next(now);
                prop_assert!(stamps.last() <= clock(now) + SLACK * 2);
                now += BEHIND + SLACK + Duration::from_millis(pause.into());
                stamps.follow(now, at(clock(now)));
                kept = stamps.to_store().unwrap_or(kept);
                stamps.next(now);
                prop_assert!(stamps.last() <= clock(now) - BEHIND + SLACK);
            }
            now += STEP * 2;
        }
    }
}
