//! Certificates of the cluster: how long they are good, when they are renewed, and how a node gets its next one.
//!
//! `POST /mesh/v1/renew`. The node shows the certificate that it has; the next one has the same name and addresses.

use serde::{Deserialize, Serialize};

/// Path of the renewal call.
pub const RENEW_PATH: &str = "/mesh/v1/renew";

/// What a node sends.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RenewRequest {
    /// A certificate signing request, PEM; its subject is ignored, its key is what counts.
    pub csr_pem: String,
}

/// What the control service answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RenewResponse {
    /// The node's next certificate (client and server use), PEM.
    pub certificate_pem: String,
}

/// When a certificate is good, in seconds since 1970; both ends belong to it (RFC 5280 section 4.1.2.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first second.
    pub from: i64,
    /// The last second.
    pub until: i64,
}

impl Validity {
    /// Whether the certificate is good now.
    pub fn holds(self, now: i64) -> bool {
        (self.from..=self.until).contains(&now)
    }

    /// For how many seconds it is good as a whole.
    pub fn life(self) -> i64 {
        self.until.saturating_sub(self.from).max(0)
    }

    /// When the next certificate is due: in the sixth of its life after the first half, where in it `spread` says.
    ///
    /// A third is always left, in which the control service, or the machine, may be away: of a year, four months. Nodes that
    /// joined at the same time do not ask at the same time.
    pub fn renew_at(self, spread: u8) -> i64 {
        let life = self.life();
        self.from + life / 2 + life / 6 * i64::from(spread) / i64::from(u8::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_renewed_after_half_of_its_life_and_before_its_last_third() {
        const DAY: i64 = 86_400;
        let year = Validity { from: 1_800_000_000, until: 1_800_000_000 + 366 * DAY };
        let due = |spread| (year.renew_at(spread) - year.from) / DAY;
        assert_eq!([0, 128, 255].map(due), [183, 213, 244]);
        for now in [year.from, year.renew_at(255), year.until] {
            assert!(year.holds(now));
        }
        assert!(!year.holds(year.from - 1) && !year.holds(year.until + 1));
    }

    #[test]
    fn one_that_is_good_at_no_time_is_due_at_once() {
        let never = Validity { from: 10, until: 5 };
        assert_eq!((never.life(), never.renew_at(255)), (0, 10));
        assert!(![4, 5, 7, 10, 11].into_iter().any(|now| never.holds(now)));
    }
}
