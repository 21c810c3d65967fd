//! Commands that people read: in the README, in docs/, and in the examples of each program's help. What stands there has to exist.

use std::fmt::Display;
use std::fs;

use crate::artifacts::repository;

/// Where they stand.
const TEXTS: [&str; 11] = [
    "README.md",
    "docs/API.md",
    "docs/ARCHITECTURE.md",
    "docs/BENCHMARKS.md",
    "docs/OPERATIONS.md",
    "vagrant/README.md",
    "dist/agent.yaml",
    "agent/src/cli.rs",
    "control/src/main.rs",
    "meshctl/src/cli.rs",
    "xtask/src/main.rs",
];
/// A text may have commands inside of commands: `a && b`, `a | b`, `a > file`, `a # what it is`.
const ENDS: [&str; 5] = ["&&", "|", ">", "#", ";"];

/// A command as it is documented.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// The file.
    pub file: &'static str,
    /// Program and arguments.
    pub words: Vec<String>,
}

/// All documented commands of a program: `meshctl`, or `cargo xtask`.
pub fn commands(program: &str) -> Vec<Command> {
    let texts = TEXTS.into_iter().map(|file| {
        let text = fs::read_to_string(repository().join(file));
        (file, text.unwrap_or_else(|error| panic!("read {file}: {error}")))
    });
    let of_text = |(file, text): (&'static str, String)| {
        let all = pieces(file, &text).into_iter().filter_map(|piece| command(&piece, program));
        all.map(|words| Command { file, words }).collect::<Vec<_>>()
    };
    texts.flat_map(of_text).collect()
}

/// Panics where a program would not take a command that is documented for it. `parse` is what its command line makes of the words.
pub fn assert_exist<C, E: Display>(program: &str, parse: impl Fn(Vec<String>) -> Result<C, E>) {
    for Command { file, words } in commands(program) {
        let shown = words.join(" ");
        if let Err(error) = parse(words) {
            let error = error.to_string();
            assert!(is_incomplete(&error), "{file}: {shown}\n{error}");
        }
    }
}

/// Texts may leave words out, or ask for help: that fails otherwise than a word that does not exist.
fn is_incomplete(error: &str) -> bool {
    let Some(error) = error.strip_prefix("error: ") else { return true };
    let beginnings = ["the following required arguments", "a value is required"];
    beginnings.iter().any(|text| error.starts_with(text)) || error.contains("requires a subcommand")
}

/// What may be a command: lines of examples, and what stands between backticks.
fn pieces(file: &str, text: &str) -> Vec<String> {
    let mut pieces = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.starts_with("```") {
            fenced = !fenced;
        } else if fenced {
            pieces.push(line.to_owned());
        } else {
            pieces.extend(line.split('`').skip(1).step_by(2).map(str::to_owned));
            if file.ends_with(".rs") {
                // Examples of help stand in strings, with their ends of lines or without; what they do comes behind spaces.
                let lines = line.split("\\n").filter_map(|part| part.strip_prefix("  "));
                let examples = lines.filter_map(|part| part.split('"').next()?.split("  ").next());
                pieces.extend(examples.map(str::to_owned));
            }
        }
    }
    pieces.iter().flat_map(|piece| split(piece)).collect()
}

fn split(piece: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    for word in piece.split_whitespace() {
        if ENDS.iter().any(|end| word.starts_with(end)) {
            parts.push(String::new());
            if word.starts_with('#') {
                break;
            }
        } else if let Some(part) = parts.last_mut() {
            part.push(' ');
            part.push_str(word);
        }
    }
    parts
}

fn command(piece: &str, program: &str) -> Option<Vec<String>> {
    let mut words: Vec<&str> = piece.split_whitespace().collect();
    // `target/debug/meshctl` is `meshctl`.
    let first = words.first_mut()?;
    *first = first.rsplit('/').next()?;
    let name: Vec<&str> = program.split(' ').collect();
    let arguments = words.strip_prefix(name.as_slice()).filter(|rest| !rest.is_empty())?;
    // A sentence about the program is no command.
    let is_word =
        |word: &&str| word.starts_with(|c: char| c.is_ascii_alphanumeric() || "-[/<".contains(c));
    arguments.iter().all(is_word).then(|| {
        let all = [program].into_iter().chain(arguments.iter().copied());
        all.map(|word| word.trim_matches(['\'', '"']).to_owned()).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(file: &str, text: &str) -> Vec<String> {
        let all = pieces(file, text).into_iter().filter_map(|piece| command(&piece, "meshctl"));
        all.map(|words| words.join(" ")).collect()
    }

    #[test]
    fn commands_are_found_where_people_read_them() {
        let text = "Try `meshctl get nodes` or `kubectl get nodes`, not meshctl at all.\n```sh\n\
            target/debug/meshctl routes       # where it goes\ncat a | meshctl apply -f -  && meshctl check\n```\n";
        assert_eq!(
            found("x.md", text),
            ["meshctl get nodes", "meshctl routes", "meshctl apply -f -", "meshctl check"]
        );
        let text = r#"    after_help = "Examples:\n  meshctl why a b:80\n  meshctl token"#;
        assert_eq!(found("x.rs", text), ["meshctl why a b:80", "meshctl token"]);
    }

    #[test]
    fn each_program_has_some() {
        for program in ["meshctl", "mesh-agent", "mesh-control", "cargo xtask"] {
            assert!(commands(program).len() > 3, "{program}: {:?}", commands(program));
        }
    }
}
