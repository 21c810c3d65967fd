//! The command line, as words and `--name value` settings.

use std::str::FromStr;

/// What is left of the command line.
pub(crate) struct Args {
    words: Vec<String>,
}

impl Args {
    /// Takes the process's arguments without the program name.
    pub(crate) fn from_env() -> Self {
        Self { words: std::env::args().skip(1).collect() }
    }

    /// Removes and returns the first word.
    pub(crate) fn positional(&mut self) -> Option<String> {
        (!self.words.is_empty()).then(|| self.words.remove(0))
    }

    /// Removes a switch and says whether it was there.
    pub(crate) fn switch(&mut self, name: &str) -> bool {
        let at = self.words.iter().position(|w| w == name);
        at.map(|i| self.words.remove(i)).is_some()
    }

    /// Removes a setting and its value; `default` when it is absent.
    pub(crate) fn setting<T: FromStr>(&mut self, name: &str, default: T) -> Result<T, String> {
        Ok(self.optional(name)?.unwrap_or(default))
    }

    /// Removes a setting and its value.
    pub(crate) fn optional<T: FromStr>(&mut self, name: &str) -> Result<Option<T>, String> {
        let Some(at) = self.words.iter().position(|w| w == name) else { return Ok(None) };
        self.words.remove(at);
        if at >= self.words.len() {
            return Err(format!("{name} needs a value"));
        }
        let value = self.words.remove(at);
        value.parse().map(Some).map_err(|_| format!("{name} {value}: not a valid value"))
    }

    /// Refuses what nobody asked for.
    pub(crate) fn finish(&self) -> Result<(), String> {
        match self.words.first() {
            Some(word) => Err(format!("unknown argument {word}")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_taken_out_and_the_rest_is_refused() {
        let words = ["load", "x", "--rate", "5", "--keep", "--odd"].map(String::from).to_vec();
        let mut args = Args { words };
        assert_eq!(args.positional().as_deref(), Some("load"));
        assert_eq!(args.positional().as_deref(), Some("x"));
        assert_eq!(args.setting("--rate", 1u32), Ok(5));
        assert_eq!(args.setting("--secs", 7u64), Ok(7));
        assert!(args.switch("--keep"));
        assert!(args.finish().is_err());
        assert!(Args { words: vec!["--rate".into()] }.setting("--rate", 1u32).is_err());
    }
}
