//! Runs tests one after the other against something that is made once and removed at the end.
//!
//! The standard harness has no end at which a shared cluster could be removed. This one reads the same filters,
//! prints the same lines, and a panic or an error of one test does not keep the others from running.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use anyhow::Result;

/// One test: its name and what it does.
pub struct Test<C> {
    /// Name, as in `cargo test NAME`.
    pub name: &'static str,
    /// The test.
    pub run: fn(&C) -> Result<()>,
}

/// What the command line asks for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Selection {
    filters: Vec<String>,
    skips: Vec<String>,
    exact: bool,
    list: bool,
}

impl Selection {
    /// Reads the standard harness's arguments; the ones that mean nothing here are ignored.
    pub fn from_args(args: impl Iterator<Item = String>) -> Self {
        let mut selection = Self::default();
        let mut args = args;
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--list" => selection.list = true,
                "--exact" => selection.exact = true,
                "--skip" => selection.skips.extend(args.next()),
                "--test-threads" | "--format" | "--color" | "--logfile" => drop(args.next()),
                flag if flag.starts_with('-') => {}
                filter => selection.filters.push(filter.to_owned()),
            }
        }
        selection
    }

    /// Whether only the names are asked for.
    pub fn lists(&self) -> bool {
        self.list
    }

    /// Whether the test runs.
    pub fn takes(&self, name: &str) -> bool {
        let hit = |f: &String| if self.exact { name == f } else { name.contains(f.as_str()) };
        (self.filters.is_empty() || self.filters.iter().any(hit)) && !self.skips.iter().any(hit)
    }
}

/// What became of the tests.
#[derive(Debug, Default)]
pub struct Tally {
    passed: usize,
    failed: Vec<String>,
    filtered: usize,
}

impl Tally {
    /// Runs the selected tests.
    pub fn run<C>(&mut self, tests: &[Test<C>], selection: &Selection, context: &C) {
        for test in tests {
            if selection.takes(test.name) {
                self.one(test.name, || (test.run)(context));
            } else {
                self.filtered += 1;
            }
        }
    }

    /// Runs one test and prints its line; says whether it passed.
    pub fn one(&mut self, name: &str, run: impl FnOnce() -> Result<()>) -> bool {
        let start = Instant::now();
        println!("test {name} ...");
        let result = catch_unwind(AssertUnwindSafe(run));
        let took = start.elapsed().as_secs_f32();
        let why = match result {
            Ok(Ok(())) => {
                println!("test {name} ... ok ({took:.1} s)");
                self.passed += 1;
                return true;
            }
            Ok(Err(e)) => format!("{e:?}"),
            Err(_) => "panicked".to_owned(),
        };
        println!("test {name} ... FAILED ({took:.1} s)\n{why}\n");
        self.failed.push(name.to_owned());
        false
    }

    /// Whether a test failed.
    pub fn any_failed(&self) -> bool {
        !self.failed.is_empty()
    }

    /// Prints the closing line; an error when a test failed.
    pub fn close(&self, since: Instant) -> Result<()> {
        if !self.failed.is_empty() {
            println!("\nfailures:\n    {}", self.failed.join("\n    "));
        }
        println!(
            "\ntest result: {}. {} passed; {} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
            if self.failed.is_empty() { "ok" } else { "FAILED" },
            self.passed,
            self.failed.len(),
            self.filtered,
            since.elapsed().as_secs_f32(),
        );
        anyhow::ensure!(self.failed.is_empty(), "{} tests failed", self.failed.len());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(args: &[&str]) -> Selection {
        Selection::from_args(args.iter().map(|a| (*a).to_owned()))
    }

    #[test]
    fn the_usual_arguments_select() {
        let s = selection(&["--nocapture", "kill", "--skip", "dns", "--test-threads", "1"]);
        assert!(s.takes("kill_agent") && !s.takes("kill_dns") && !s.takes("scale"));
        assert!(selection(&[]).takes("x"));
        assert!(!selection(&["ab", "--exact"]).takes("abc"));
        assert!(selection(&["--list"]).lists());
    }

    #[test]
    fn failures_and_panics_are_counted() {
        let tests: [Test<u8>; 3] = [
            Test { name: "good", run: |_| Ok(()) },
            Test { name: "bad", run: |_| anyhow::bail!("no") },
            Test { name: "worse", run: |n| panic!("{n}") },
        ];
        let mut tally = Tally::default();
        tally.run(&tests, &selection(&[]), &1);
        assert_eq!((tally.passed, tally.failed.len()), (1, 2));
        assert!(tally.close(Instant::now()).is_err());
    }
}
