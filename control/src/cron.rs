//! When something that recurs is due: schedules in the form of cron, in a time zone. Pure.
//!
//! Five fields (minute, hour, day of the month, month, day of the week), with lists, ranges, steps and names, or a word such as
//! `@hourly`; as in Kubernetes, which takes them as github.com/robfig/cron reads them. Where a zone's clock is put forward, the times
//! that are left out are left out; where it is put back, those that are twice are twice.

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

/// Longer than any schedule can take that comes at all: leap days may be eight years apart.
const HORIZON_DAYS: usize = 9 * 366;
/// More than any search takes: each day, and the hours and minutes of a few.
const MOST_HOPS: usize = HORIZON_DAYS + 10_000;
const MINUTE: SignedDuration = SignedDuration::from_mins(1);

const MONTHS: [&str; 12] =
    ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const DAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

/// A schedule that was understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Schedule {
    minutes: Field,
    hours: Field,
    days: Field,
    months: Field,
    weekdays: Field,
}

/// The values that a field allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Field {
    bits: u64,
    /// Whether it is `*`: it restricts nothing.
    any: bool,
}

/// The values that a field can have.
struct Bounds {
    name: &'static str,
    least: u8,
    most: u8,
    words: &'static [&'static str],
}

const BOUNDS: [Bounds; 5] = [
    Bounds { name: "minute", least: 0, most: 59, words: &[] },
    Bounds { name: "hour", least: 0, most: 23, words: &[] },
    Bounds { name: "day of the month", least: 1, most: 31, words: &[] },
    Bounds { name: "month", least: 1, most: 12, words: &MONTHS },
    Bounds { name: "day of the week", least: 0, most: 6, words: &DAYS },
];

impl Schedule {
    /// Reads a schedule; an error says what is wrong with it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.starts_with('@') {
            return Self::parse(word(text)?);
        }
        let parts: Vec<&str> = text.split_whitespace().collect();
        if parts.len() != 5 {
            return Err(format!("expected exactly 5 fields, found {}: {parts:?}", parts.len()));
        }
        let mut fields = [Field::default(); 5];
        for ((field, bounds), part) in fields.iter_mut().zip(&BOUNDS).zip(parts) {
            *field = parse_field(part, bounds)?;
        }
        let [minutes, hours, days, months, weekdays] = fields;
        Ok(Self { minutes, hours, days, months, weekdays })
    }

    /// The first time after `after`; `None` when there is none for years.
    pub(crate) fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let begun = after.as_second().div_euclid(60) * 60;
        let mut at = Timestamp::from_second(begun).ok()?.checked_add(MINUTE).ok()?;
        for _ in 0..MOST_HOPS {
            let local = zone.to_datetime(at);
            let later = if !self.has_day(local.date()) {
                let tomorrow = local.date().tomorrow().ok()?.at(0, 0, 0, 0);
                let tomorrow = zone.to_timestamp(tomorrow).ok()?;
                // Where a clock is put back at midnight, a day may begin twice.
                tomorrow.max(at.checked_add(MINUTE).ok()?)
            } else if !self.hours.has(local.hour()) {
                let rest = 60 - i64::from(local.minute());
                at.checked_add(SignedDuration::from_mins(rest)).ok()?
            } else if !self.minutes.has(local.minute()) {
                at.checked_add(MINUTE).ok()?
            } else {
                return Some(at);
            };
            at = later;
        }
        None
    }

    /// The last time after `after` that is not later than `until`.
    pub(crate) fn latest(
        &self,
        after: Timestamp,
        until: Timestamp,
        zone: &TimeZone,
    ) -> Option<Timestamp> {
        let hours = |hours: i64| SignedDuration::from_hours(hours);
        // Further and further back: there may have been millions.
        for back in [hours(1), hours(24), hours(24 * 32), hours(24 * 366), hours(24 * 366 * 9)] {
            let from = until.checked_sub(back).unwrap_or(Timestamp::MIN).max(after);
            let mut found = None;
            let mut at = self.next(from, zone);
            while let Some(time) = at.filter(|time| *time <= until) {
                found = Some(time);
                at = self.next(time, zone);
            }
            if found.is_some() || from == after {
                return found;
            }
        }
        None
    }

    /// How often it was due after `after` and until `until`; `most` if it was more often.
    pub(crate) fn count(
        &self,
        after: Timestamp,
        until: Timestamp,
        zone: &TimeZone,
        most: usize,
    ) -> usize {
        let first = self.next(after, zone);
        let all = std::iter::successors(first, |at| self.next(*at, zone));
        all.take_while(|at| *at <= until).take(most).count()
    }

    /// Where both days are restricted, either is enough.
    fn has_day(&self, date: Date) -> bool {
        let weekday = date.weekday().to_sunday_zero_offset();
        let (day, weekday) = (self.days.has(date.day()), self.weekdays.has(weekday));
        let day = if self.days.any || self.weekdays.any { day && weekday } else { day || weekday };
        self.months.has(date.month()) && day
    }
}

impl Field {
    fn has(self, value: i8) -> bool {
        u32::try_from(value).is_ok_and(|value| self.bits & 1 << value != 0)
    }
}

fn word(text: &str) -> Result<&'static str, String> {
    match text {
        "@yearly" | "@annually" => Ok("0 0 1 1 *"),
        "@monthly" => Ok("0 0 1 * *"),
        "@weekly" => Ok("0 0 * * 0"),
        "@daily" | "@midnight" => Ok("0 0 * * *"),
        "@hourly" => Ok("0 * * * *"),
        _ if text.starts_with("@every") => Err("@every is not served here".to_owned()),
        _ => Err(format!("unrecognized descriptor: {text}")),
    }
}

fn parse_field(text: &str, bounds: &Bounds) -> Result<Field, String> {
    let mut all = Field::default();
    for part in text.split(',') {
        let field = parse_range(part, bounds)?;
        all = Field { bits: all.bits | field.bits, any: all.any || field.any };
    }
    Ok(all)
}

fn parse_range(part: &str, bounds: &Bounds) -> Result<Field, String> {
    let wrong = |rule: String| format!("{}: {rule}: {part}", bounds.name);
    let (range, step) = match part.split_once('/') {
        Some((range, step)) => {
            let step: u8 = digits(step).ok_or_else(|| wrong(format!("bad step {step:?}")))?;
            (range, Some(step))
        }
        None => (part, None),
    };
    let any = matches!(range, "*" | "?");
    let (first, last) = match range.split_once('-') {
        _ if any => (bounds.least, bounds.most),
        Some((first, last)) => (value(first, bounds)?, value(last, bounds)?),
        // From there on, if there are steps.
        None => {
            let first = value(range, bounds)?;
            (first, if step.is_some() { bounds.most } else { first })
        }
    };
    if first < bounds.least {
        return Err(wrong(format!(
            "beginning of range ({first}) below minimum ({})",
            bounds.least
        )));
    }
    if last > bounds.most {
        return Err(wrong(format!("end of range ({last}) above maximum ({})", bounds.most)));
    }
    if first > last {
        return Err(wrong(format!("beginning of range ({first}) beyond end of range ({last})")));
    }
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(wrong("step of range should be a positive number".to_owned()));
    }
    let values = (first..=last).step_by(usize::from(step));
    let bits = values.fold(0, |bits, value| bits | 1 << value);
    Ok(Field { bits, any: any && step == 1 })
}

/// A number, or a word that stands for one.
fn value(text: &str, bounds: &Bounds) -> Result<u8, String> {
    let lower = text.to_ascii_lowercase();
    let word = bounds.words.iter().position(|word| *word == lower);
    let word = word.and_then(|at| u8::try_from(at).ok()).map(|at| at + bounds.least);
    let bad = || format!("{}: not a value: {text:?}", bounds.name);
    word.or_else(|| digits(text)).ok_or_else(bad)
}

fn digits(text: &str) -> Option<u8> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| plain)
}

#[cfg(test)]
mod tests;
