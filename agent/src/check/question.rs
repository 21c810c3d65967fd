//! One DNS question, by hand: a resolver library would ask other servers than the one under test.

const ID: [u8; 2] = [0x6d, 0x65];

/// A question for the address of `name` (RFC 1035, section 4.1).
pub(crate) fn encode(name: &str) -> Vec<u8> {
    let mut message = vec![ID[0], ID[1], 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.').filter(|l| !l.is_empty()) {
        message.push(u8::try_from(label.len().min(63)).expect("at most 63"));
        message.extend(label.as_bytes().iter().take(63));
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}

/// Whether the answer belongs to the question and has records.
pub(crate) fn verdict(answer: &[u8]) -> Result<(), String> {
    match answer {
        [a, b, _, flags, _, _, high, low, ..] if [*a, *b] == ID => match flags & 0xf {
            0 if u16::from_be_bytes([*high, *low]) > 0 => Ok(()),
            0 => Err("the name has no address".to_owned()),
            2 => Err("the server failed (SERVFAIL)".to_owned()),
            3 => Err("the name does not exist (NXDOMAIN)".to_owned()),
            5 => Err("the server refused (REFUSED)".to_owned()),
            other => Err(format!("the server answered with code {other}")),
        },
        _ => Err("the answer is malformed".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_and_verdicts() {
        let question = encode("a.bc");
        assert_eq!(&question[12..], [1, b'a', 2, b'b', b'c', 0, 0, 1, 0, 1]);
        let mut answer = question.clone();
        answer[7] = 1;
        assert_eq!(verdict(&answer), Ok(()));
        answer[3] = 3;
        assert!(verdict(&answer).unwrap_err().contains("NXDOMAIN"));
        assert!(verdict(&answer[..4]).is_err());
    }
}
