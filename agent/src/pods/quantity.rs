//! Kubernetes quantities (`100m`, `1.5Gi`, `2e3`) as whole numbers.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

const NANO: i128 = 1_000_000_000;

/// The text is not a quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a quantity: {0:?}")]
pub(crate) struct InvalidQuantity(String);

/// A CPU quantity in thousandths of a core, rounded up.
pub(crate) fn millis(quantity: &Quantity) -> Result<i64, InvalidQuantity> {
    scaled(&quantity.0, NANO / 1000)
}

/// A memory quantity in bytes, rounded up.
pub(crate) fn bytes(quantity: &Quantity) -> Result<i64, InvalidQuantity> {
    scaled(&quantity.0, NANO)
}

fn scaled(text: &str, unit: i128) -> Result<i64, InvalidQuantity> {
    let invalid = || InvalidQuantity(text.to_owned());
    let nanos = nanos(text).ok_or_else(invalid)?;
    let whole = nanos.div_euclid(unit) + i128::from(nanos.rem_euclid(unit) != 0);
    i64::try_from(whole).map_err(|_| invalid())
}

fn nanos(text: &str) -> Option<i128> {
    let end = text
        .find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '+' | '-')))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let negative = whole.starts_with('-');
    let digits = whole.strip_prefix(['+', '-']).unwrap_or(whole);
    if digits.starts_with(['+', '-']) || digits.is_empty() && fraction.is_empty() {
        return None;
    }
    let whole: i128 = if digits.is_empty() { 0 } else { digits.parse().ok()? };
    // Nine decimals are all that a quantity has; more are rounded away.
    let mut decimals = fraction.get(..fraction.len().min(9))?.to_owned();
    if !decimals.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    while decimals.len() < 9 {
        decimals.push('0');
    }
    let value = whole.checked_mul(NANO)?.checked_add(decimals.parse().ok()?)?;
    let (multiplier, divisor) = factor(suffix)?;
    let value = value.checked_mul(multiplier)? / divisor;
    Some(if negative { -value } else { value })
}

/// What a suffix multiplies with and divides by.
fn factor(suffix: &str) -> Option<(i128, i128)> {
    let exponent = suffix.strip_prefix(['e', 'E']).filter(|rest| !rest.is_empty());
    if let Some(exponent) = exponent {
        let power: i32 = exponent.parse().ok()?;
        let size = 10i128.checked_pow(power.unsigned_abs()).filter(|_| power.abs() <= 18)?;
        return Some(if power < 0 { (1, size) } else { (size, 1) });
    }
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1000),
        "k" => (1000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_become_whole_numbers() {
        let q = |text: &str| Quantity(text.to_owned());
        for (text, expected) in
            [("100m", 100), ("1", 1000), ("0.5", 500), ("1.5", 1500), ("1u", 1), ("2e3m", -1)]
        {
            assert_eq!(millis(&q(text)).unwrap_or(-1), expected, "{text}");
        }
        for (text, expected) in [
            ("128Mi", 128 << 20),
            ("1.5Gi", 3 << 29),
            ("1k", 1000),
            ("1e3", 1000),
            ("1E", 1_000_000_000_000_000_000),
            (".5Ki", 512),
        ] {
            assert_eq!(bytes(&q(text)), Ok(expected), "{text}");
        }
        for bad in ["", "m", "1.x", "abc", "1Zi", "99999999999999999999Ei", "1e99", "--1"] {
            assert!(bytes(&q(bad)).is_err(), "{bad}");
        }
    }
}
