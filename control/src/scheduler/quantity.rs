//! Kubernetes quantities (`100m`, `1.5Gi`, `2e3`) as exact thousandths.

/// The value in thousandths of the unit, rounded up; `None` when the text is no quantity or too large.
///
/// Source: the grammar at `io.k8s.apimachinery.pkg.api.resource.Quantity`.
pub(crate) fn thousandths(text: &str) -> Option<i64> {
    let (negative, unsigned) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let end = unsigned.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(unsigned.len());
    let (number, suffix) = unsigned.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    let fraction = fraction.trim_end_matches('0');
    let digits: i128 = match format!("{whole}{fraction}").trim_start_matches('0') {
        "" => 0,
        digits if digits.len() <= 20 => digits.parse().ok()?,
        _ => return None,
    };
    let (mut numerator, mut denominator) = multiplier(suffix)?;
    numerator = numerator.checked_mul(1000)?;
    denominator = denominator.checked_mul(power(10, u32::try_from(fraction.len()).ok()?)?)?;
    let product = digits.checked_mul(numerator)?;
    let rounded = if negative {
        -(product / denominator)
    } else {
        product.checked_add(denominator - 1)? / denominator
    };
    i64::try_from(rounded).ok()
}

/// The value in whole units, rounded up.
pub(crate) fn units(text: &str) -> Option<i64> {
    thousandths(text).map(|value| value.div_euclid(1000) + i64::from(value.rem_euclid(1000) != 0))
}

fn multiplier(suffix: &str) -> Option<(i128, i128)> {
    let decimal = |exponent: u32| Some((power(10, exponent)?, 1));
    let binary = |exponent: u32| Some((power(2, exponent)?, 1));
    match suffix {
        "n" => Some((1, 1_000_000_000)),
        "u" => Some((1, 1_000_000)),
        "m" => Some((1, 1000)),
        "" => Some((1, 1)),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(10),
        "Mi" => binary(20),
        "Gi" => binary(30),
        "Ti" => binary(40),
        "Pi" => binary(50),
        "Ei" => binary(60),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            let scale = power(10, exponent.unsigned_abs())?;
            Some(if exponent < 0 { (1, scale) } else { (scale, 1) })
        }
    }
}

fn power(base: i128, exponent: u32) -> Option<i128> {
    base.checked_pow(exponent).filter(|_| exponent <= 60)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_suffix_counts() {
        for (text, expected) in [
            ("1", 1000),
            ("0", 0),
            ("100m", 100),
            ("0.1", 100),
            (".5", 500),
            ("1.", 1000),
            ("1.5Gi", 1_610_612_736_000),
            ("2e3", 2_000_000),
            ("2E-1", 200),
            ("1u", 1),
            ("1n", 1),
            ("1k", 1_000_000),
            ("-1500m", -1500),
            ("0.0001", 1),
        ] {
            assert_eq!(thousandths(text), Some(expected), "{text}");
        }
        assert_eq!(units("1500m"), Some(2));
        assert_eq!(units("128Mi"), Some(134_217_728));
    }

    #[test]
    fn what_is_no_quantity_is_refused() {
        for text in [
            "",
            "m",
            ".",
            "1.2.3",
            "1x",
            "1 Gi",
            "1e",
            "1e99",
            "--1",
            "10E",
            "9".repeat(40).as_str(),
        ] {
            assert_eq!(thousandths(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "[-+]?[0-9.]{0,25}[a-zA-Z0-9+-]{0,4}") {
            let _ = thousandths(&text);
        }

        #[test]
        fn whole_numbers_are_exact(n in 0i64..1_000_000_000) {
            prop_assert_eq!(thousandths(&n.to_string()), Some(n * 1000));
            prop_assert_eq!(thousandths(&format!("{n}m")), Some(n));
            prop_assert_eq!(units(&format!("{n}Ki")), Some(n * 1024));
        }
    }
}
