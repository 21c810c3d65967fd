//! All figures of a run: their medians as a table, and each of them as a line of JSON.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::contestant::Contestant;
use super::measure::Figure;
use crate::bench::median;

/// Figures by contestant, in the order in which they were measured.
#[derive(Debug, Default)]
pub(super) struct Figures {
    rows: Vec<(Contestant, Figure)>,
}

impl Figures {
    /// Adds what one contestant reached in one round.
    pub(super) fn add(&mut self, contestant: Contestant, figures: Vec<Figure>) {
        self.rows.extend(figures.into_iter().map(|figure| (contestant, figure)));
    }

    /// One line per figure: the medians of all contestants, and ours divided by each.
    pub(super) fn print(&self) {
        let contestants = self.contestants();
        let names: String = contestants.iter().map(|c| format!("{:>22}", c.to_string())).collect();
        println!("{:<34}{names}", "median (mesh / this one)");
        for (name, unit) in self.names() {
            let ours = self.median(Contestant::Mesh, name);
            let column = |&contestant: &Contestant| {
                let value = self.median(contestant, name);
                let ratio = if contestant == Contestant::Mesh {
                    String::new()
                } else {
                    format!("({:.2})", ours / value)
                };
                format!("{:>13}{ratio:>9}", readable(value))
            };
            let columns: String = contestants.iter().map(column).collect();
            println!("{:<34}{columns}", format!("{name}, {unit}"));
        }
    }

    /// One JSON object per figure and round.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let line = |(contestant, (name, value, unit)): &(Contestant, Figure)| {
            json!({"contestant": contestant.to_string(), "figure": name, "value": value, "unit": unit})
                .to_string()
                + "\n"
        };
        let text: String = self.rows.iter().map(line).collect();
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }

    fn contestants(&self) -> Vec<Contestant> {
        let mut all: Vec<Contestant> = Vec::new();
        for (contestant, _) in &self.rows {
            if !all.contains(contestant) {
                all.push(*contestant);
            }
        }
        all
    }

    fn names(&self) -> Vec<(&'static str, &'static str)> {
        let mut all: Vec<(&str, &str)> = Vec::new();
        for (_, (name, _, unit)) in &self.rows {
            if !all.contains(&(name, unit)) {
                all.push((name, unit));
            }
        }
        all
    }

    fn median(&self, contestant: Contestant, name: &str) -> f64 {
        let of = |(who, (what, value, _)): &(Contestant, Figure)| {
            (*who == contestant && *what == name).then_some(*value)
        };
        median(&mut self.rows.iter().filter_map(of).collect::<Vec<_>>())
    }
}

fn readable(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_contestant_has_its_median() {
        let mut figures = Figures::default();
        for value in [3.0, 1.0, 2.0] {
            figures.add(Contestant::Mesh, vec![("TCP", value, "Gbit/s")]);
            figures.add(Contestant::Plain, vec![("TCP", value * 10.0, "Gbit/s")]);
        }
        assert_eq!(figures.contestants(), [Contestant::Mesh, Contestant::Plain]);
        assert!((figures.median(Contestant::Plain, "TCP") - 20.0).abs() < 1e-9);
        let path = std::env::temp_dir().join(format!("mesh-figures-{}", std::process::id()));
        figures.write(&path).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(text.lines().count(), 6);
        assert!(text.starts_with("{\"contestant\":\"mesh\""), "{text}");
    }
}
