use proptest::prelude::*;

use super::*;

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn next(schedule: &str, after: &str) -> String {
    let found = Schedule::parse(schedule).unwrap().next(at(after), &TimeZone::UTC);
    found.map_or("never".to_owned(), |at| at.to_string())
}

fn berlin() -> TimeZone {
    // As the rule says: the tests do not need the machine's database.
    TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
}

#[test]
fn the_next_time_is_the_first_that_fits() {
    for (schedule, after, expected) in [
        ("* * * * *", "2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z"),
        ("* * * * *", "2026-01-01T00:00:59.5Z", "2026-01-01T00:01:00Z"),
        ("0 * * * *", "2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z"),
        ("*/15 * * * *", "2026-01-01T00:50:00Z", "2026-01-01T01:00:00Z"),
        ("5/20 * * * *", "2026-01-01T00:26:00Z", "2026-01-01T00:45:00Z"),
        ("30 4 * * *", "2026-01-01T04:30:00Z", "2026-01-02T04:30:00Z"),
        ("0 9-17/4 * * MON-fri", "2026-01-02T17:00:00Z", "2026-01-05T09:00:00Z"),
        ("0 0 1,15 * *", "2026-01-15T00:00:00Z", "2026-02-01T00:00:00Z"),
        ("0 0 29 feb *", "2026-01-01T00:00:00Z", "2028-02-29T00:00:00Z"),
        ("0 0 29 2 *", "2096-03-01T00:00:00Z", "2104-02-29T00:00:00Z"),
        ("0 0 31 2 *", "2026-01-01T00:00:00Z", "never"),
        // Either day, if both are restricted.
        ("0 0 13 * 5", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"),
        ("0 0 13 * 5", "2026-01-09T00:00:00Z", "2026-01-13T00:00:00Z"),
        ("0 0 ? * 5", "2026-01-03T00:00:00Z", "2026-01-09T00:00:00Z"),
        ("@hourly", "2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z"),
        ("@weekly", "2026-01-01T00:00:00Z", "2026-01-04T00:00:00Z"),
        ("@yearly", "2026-01-01T00:00:00Z", "2027-01-01T00:00:00Z"),
    ] {
        assert_eq!(next(schedule, after), expected, "{schedule} after {after}");
    }
}

#[test]
fn what_is_no_schedule_is_explained() {
    for (schedule, why) in [
        ("", "expected exactly 5 fields, found 0"),
        ("* * * *", "expected exactly 5 fields, found 4"),
        ("60 * * * *", "minute: end of range (60) above maximum (59)"),
        ("* * 0 * *", "day of the month: beginning of range (0) below minimum (1)"),
        ("* * * * 7", "day of the week: end of range (7) above maximum (6)"),
        ("5-3 * * * *", "minute: beginning of range (5) beyond end of range (3)"),
        ("*/0 * * * *", "minute: step of range should be a positive number"),
        ("*/x * * * *", "minute: bad step \"x\""),
        ("+1 * * * *", "minute: not a value: \"+1\""),
        ("1, * * * *", "minute: not a value: \"\""),
        ("* * * mai *", "month: not a value: \"mai\""),
        ("@never", "unrecognized descriptor: @never"),
        ("@every 5m", "@every is not served here"),
    ] {
        let found = Schedule::parse(schedule).unwrap_err();
        assert!(found.starts_with(why), "{schedule}: {found}");
    }
}

#[test]
fn clocks_that_are_put_forward_and_back_leave_out_and_repeat() {
    let all = |schedule: &str, after: &str, count: usize| {
        let (schedule, zone) = (Schedule::parse(schedule).unwrap(), berlin());
        let times =
            std::iter::successors(schedule.next(at(after), &zone), |at| schedule.next(*at, &zone));
        times.take(count).map(|at| at.to_string()).collect::<Vec<_>>()
    };
    // 2026-03-29: from 02:00 to 03:00.
    let nightly = all("30 2 * * *", "2026-03-27T12:00:00Z", 2);
    assert_eq!(nightly, ["2026-03-28T01:30:00Z", "2026-03-30T00:30:00Z"]);
    let hourly = all("0 * * * *", "2026-03-29T00:00:00Z", 2);
    assert_eq!(hourly, ["2026-03-29T01:00:00Z", "2026-03-29T02:00:00Z"]);
    // 2026-10-25: from 03:00 to 02:00.
    let nightly = all("30 2 * * *", "2026-10-24T12:00:00Z", 3);
    assert_eq!(nightly, ["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z", "2026-10-26T01:30:00Z"]);
    let daily = all("0 9 * * *", "2026-10-24T00:00:00Z", 2);
    assert_eq!(daily, ["2026-10-24T07:00:00Z", "2026-10-25T08:00:00Z"]);
}

#[test]
fn of_many_times_the_last_is_found() {
    let (minutely, daily) =
        (Schedule::parse("* * * * *").unwrap(), Schedule::parse("@daily").unwrap());
    let (after, until) = (at("2020-01-01T00:00:00Z"), at("2026-01-01T12:00:30Z"));
    assert_eq!(minutely.latest(after, until, &TimeZone::UTC), Some(at("2026-01-01T12:00:00Z")));
    assert_eq!(daily.latest(after, until, &TimeZone::UTC), Some(at("2026-01-01T00:00:00Z")));
    assert_eq!(daily.latest(at("2026-01-01T00:00:00Z"), until, &TimeZone::UTC), None);
    let never = Schedule::parse("0 0 31 2 *").unwrap();
    assert_eq!(never.latest(after, until, &TimeZone::UTC), None);
    assert_eq!(minutely.count(after, until, &TimeZone::UTC, 101), 101);
    assert_eq!(daily.count(at("2025-12-30T12:00:00Z"), until, &TimeZone::UTC, 101), 2);
}

/// One field: its text, and the values that it means.
fn field(least: i8, most: i8) -> impl Strategy<Value = (String, Vec<i8>)> {
    let range = (least..=most, least..=most, 1..8_usize).prop_map(|(a, b, step)| {
        let (first, last) = (a.min(b), a.max(b));
        (format!("{first}-{last}/{step}"), (first..=last).step_by(step).collect::<Vec<_>>())
    });
    prop_oneof![
        2 => Just(("*".to_owned(), (least..=most).collect::<Vec<_>>())),
        2 => (least..=most).prop_map(|value| (value.to_string(), vec![value])),
        3 => range,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Minute by minute, the plain way, nothing else is found within three days.
    #[test]
    fn no_time_is_passed_over_and_none_is_wrong(
        minute in field(0, 59),
        hour in field(0, 23),
        day in field(1, 31),
        month in field(1, 12),
        weekday in field(0, 6),
        start in 1_767_225_600_i64..1_830_000_000,
        summer in any::<bool>(),
    ) {
        let text = [&minute, &hour, &day, &month, &weekday].map(|field| field.0.clone()).join(" ");
        let schedule = Schedule::parse(&text).unwrap();
        let zone = if summer { berlin() } else { TimeZone::UTC };
        let fits = |at: Timestamp| {
            let local = zone.to_datetime(at);
            let day_fits = day.1.contains(&local.day());
            let weekday_fits = weekday.1.contains(&local.weekday().to_sunday_zero_offset());
            let either = day.0 != "*" && weekday.0 != "*";
            minute.1.contains(&local.minute())
                && hour.1.contains(&local.hour())
                && month.1.contains(&local.month())
                && if either { day_fits || weekday_fits } else { day_fits && weekday_fits }
        };
        let first = start / 60 * 60 + 60;
        let plain = (0..3 * 1440).map(|n| Timestamp::from_second(first + n * 60).unwrap()).find(|at| fits(*at));
        let found = schedule.next(Timestamp::from_second(start).unwrap(), &zone);
        match plain {
            Some(plain) => prop_assert_eq!(found, Some(plain), "{}", text),
            None => prop_assert!(found.is_none_or(|at| at.as_second() >= first + 3 * 86_400 && fits(at))),
        }
        if let Some(found) = found {
            let before = Timestamp::from_second(start).unwrap();
            prop_assert_eq!(schedule.latest(before, found, &zone), Some(found));
        }
    }

    #[test]
    fn nothing_panics(text in "[0-9a-zA-Z*/?,@ -]{0,24}") {
        let _ = Schedule::parse(&text);
    }
}
