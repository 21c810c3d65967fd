//! Tables as people know them from kubectl: upper-case headings, three spaces, no lines.

use anyhow::bail;
use serde::Serialize;

use crate::cli::Output;

/// Prints rows in aligned columns; the last one is not padded.
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>]) {
    print!("{}", render(headings, rows));
}

fn render(headings: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = headings.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let heading: Vec<String> = headings.iter().map(|h| (*h).to_owned()).collect();
    for row in std::iter::once(&heading).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            line.push_str(&format!("{cell:<width$}   "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Prints JSON.
pub(crate) fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// For reports, which exist as tables and JSON only.
pub(crate) fn report<T: Serialize>(
    output: Output,
    value: &T,
    as_table: impl FnOnce(),
) -> anyhow::Result<()> {
    match output {
        Output::Json => json(value),
        Output::Table | Output::Wide => {
            as_table();
            Ok(())
        }
        Output::Yaml | Output::Name => {
            bail!("-o yaml and -o name are for objects: use table, wide or json here")
        }
    }
}

/// A number of seconds as people say it.
pub(crate) fn age(secs: u64) -> String {
    match secs {
        0..=119 => format!("{secs}s"),
        120..=7199 => format!("{}m", secs / 60),
        7200..=172_799 => format!("{}h", secs / 3600),
        _ => format!("{}d", secs / 86_400),
    }
}

/// A number of bytes as people say it.
pub(crate) fn bytes(n: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_have_no_trailing_spaces() {
        let rows =
            vec![vec!["a".to_owned(), "1".to_owned()], vec!["long name".to_owned(), String::new()]];
        assert_eq!(render(&["NAME", "X"], &rows), "NAME        X\na           1\nlong name\n");
    }

    #[test]
    fn sizes_and_ages_are_short() {
        assert_eq!(
            (bytes(1023), bytes(1536), age(90), age(7200)),
            ("1023 B".into(), "1.5 KiB".into(), "90s".into(), "2h".into())
        );
    }
}
