//! Figures of many short turns: medians, and ratios within a round.

use std::collections::BTreeMap;

/// What a turn measured, by name: see [`Figures::show`].
pub(crate) type Turn = Vec<(&'static str, f64)>;

/// Turns of all contestants.
#[derive(Default)]
pub(crate) struct Figures {
    /// By contestant and figure, a value per round.
    values: BTreeMap<(String, &'static str), Vec<f64>>,
    contestants: Vec<String>,
    names: Vec<&'static str>,
}

impl Figures {
    pub(crate) fn add(&mut self, contestant: &str, turn: Turn) {
        if !self.contestants.iter().any(|known| known == contestant) {
            self.contestants.push(contestant.to_owned());
        }
        for (name, value) in turn {
            if !self.names.contains(&name) {
                self.names.push(name);
            }
            self.values.entry((contestant.to_owned(), name)).or_default().push(value);
        }
    }

    /// A block per figure: each contestant's median, and the median and the middle half of its ratios to the reference in the same
    /// round.
    pub(crate) fn show(&self, title: &str, comparisons: &[(&str, &str)]) {
        println!("\n{title}");
        for name in &self.names {
            println!("  {name}");
            for contestant in &self.contestants {
                let Some(values) = self.values.get(&(contestant.clone(), *name)) else { continue };
                let ratios = comparisons
                    .iter()
                    .filter(|(who, _)| who == contestant)
                    .filter_map(|(_, reference)| self.ratio(contestant, reference, name));
                let ratios: String = ratios.collect();
                println!("    {contestant:<22}{:>12}{ratios}", readable(quantile(values, 0.5)));
            }
        }
    }

    fn ratio(&self, contestant: &str, reference: &str, name: &'static str) -> Option<String> {
        let of = |who: &str| self.values.get(&(who.to_owned(), name));
        let pairs = of(contestant)?.iter().zip(of(reference)?);
        let ratios: Vec<f64> = pairs.map(|(value, reference)| value / reference).collect();
        let [low, middle, high] = [0.25, 0.5, 0.75].map(|share| quantile(&ratios, share));
        Some(format!("  {middle:.3} of {reference} ({low:.3}-{high:.3})"))
    }
}

/// The value below which a share of the values lies; between two of them it is in between.
pub(crate) fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    #[allow(clippy::cast_precision_loss, reason = "few values")]
    let place = last as f64 * share;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "within the list")]
    let below = place as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * place.fract()
}

fn readable(value: f64) -> String {
    match value {
        v if v >= 1000.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.3}"),
    }
}
