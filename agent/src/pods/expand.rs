//! `$(NAME)` in commands, arguments and environment values (Kubernetes, "dependent environment variables").

/// Replaces `$(NAME)` by its value. `$$` stands for one `$`; a name without a value stays as it is written.
pub(crate) fn expand<'a>(input: &str, mut value: impl FnMut(&str) -> Option<&'a str>) -> String {
    let mut output = String::with_capacity(input.len());
    let mut rest = input;
    while let Some(at) = rest.find('$') {
        output.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            output.push('$');
            rest = after;
        } else if let Some((name, after)) =
            rest.strip_prefix('(').and_then(|open| open.split_once(')'))
        {
            match value(name) {
                Some(value) => output.push_str(value),
                None => output.push_str(&format!("$({name})")),
            }
            rest = after;
        } else {
            output.push('$');
        }
    }
    output.push_str(rest);
    output
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lookup(name: &str) -> Option<&'static str> {
        match name {
            "A" => Some("1"),
            "NEST" => Some("$(A)"),
            "EMPTY" => Some(""),
            _ => None,
        }
    }

    #[test]
    fn names_are_replaced_as_documented() {
        for (input, expected) in [
            ("", ""),
            ("plain", "plain"),
            ("$(A)", "1"),
            ("x$(A)y$(A)", "x1y1"),
            ("$(NEST)", "$(A)"),
            ("[$(EMPTY)]", "[]"),
            ("$(NONE)", "$(NONE)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$A", "$A"),
            ("$(A", "$(A"),
            ("5$", "5$"),
            ("$()", "$()"),
        ] {
            assert_eq!(expand(input, lookup), expected, "{input}");
        }
    }

    proptest! {
        #[test]
        fn text_without_dollar_is_kept(text in "[^$]*") {
            prop_assert_eq!(expand(&text, lookup), text);
        }

        #[test]
        fn escaped_text_comes_back(text in any::<String>()) {
            prop_assert_eq!(expand(&text.replace('$', "$$"), lookup), text);
        }
    }
}
