//! Why a call failed.

use std::time::Duration;

use tonic::{Code, Status};

/// What kind of failure it was, as far as callers act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The sandbox, container or image does not exist.
    NotFound,
    /// The runtime could not be reached, or went away during the call.
    Unavailable,
    /// No answer within the time limit.
    TimedOut,
    /// The name is taken: an earlier attempt left something behind.
    Exists,
    /// Something of it is in a state that does not allow this, such as a process that still runs.
    Busy,
    /// The runtime answered with an error of its own.
    Refused,
}

/// A CRI call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {message}")]
pub struct CallError {
    /// The method, such as `RunPodSandbox`.
    pub call: &'static str,
    /// What kind of failure it was.
    pub fault: Fault,
    /// The runtime's own words.
    pub message: String,
}

impl CallError {
    pub(crate) fn from_status(call: &'static str, status: &Status) -> Self {
        Self { call, fault: fault(status), message: status.message().to_owned() }
    }

    pub(crate) fn timed_out(call: &'static str, limit: Duration) -> Self {
        let message = format!("no answer within {} s", limit.as_secs());
        Self { call, fault: Fault::TimedOut, message }
    }

    pub(crate) fn incomplete(call: &'static str) -> Self {
        Self { call, fault: Fault::Refused, message: "the answer has no content".to_owned() }
    }

    /// Whether the thing that the call was about does not exist.
    pub fn is_not_found(&self) -> bool {
        self.fault == Fault::NotFound
    }
}

fn fault(status: &Status) -> Fault {
    match status.code() {
        Code::NotFound => Fault::NotFound,
        Code::Unavailable | Code::Cancelled => Fault::Unavailable,
        Code::DeadlineExceeded => Fault::TimedOut,
        Code::AlreadyExists => Fault::Exists,
        Code::FailedPrecondition => Fault::Busy,
        _ => Fault::Refused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_follow_the_grpc_code() {
        let table = [
            (Code::NotFound, Fault::NotFound),
            (Code::Unavailable, Fault::Unavailable),
            (Code::DeadlineExceeded, Fault::TimedOut),
            (Code::AlreadyExists, Fault::Exists),
            (Code::FailedPrecondition, Fault::Busy),
            (Code::Unknown, Fault::Refused),
        ];
        for (code, expected) in table {
            let error = CallError::from_status("Version", &Status::new(code, "why"));
            assert_eq!(error.fault, expected, "{code:?}");
            assert_eq!(error.to_string(), "Version: why");
        }
    }
}
