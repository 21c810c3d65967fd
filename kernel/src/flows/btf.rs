//! The kernel's description of its own types, as far as we ask: offsets of members and names of enumerators.
//!
//! Spec: Documentation/bpf/btf.rst. aya parses it too, but keeps the types to itself.

use std::collections::BTreeMap;
use std::io;

const PATH: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
/// An anonymous structure inside another one, and so on: no kernel goes deeper.
const DEEPEST: u32 = 8;

// Kinds of types.
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;

/// The description cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum BtfError {
    #[error("read {PATH}: {0}")]
    Read(io::Error),
    #[error("{PATH} is not a description of types that we know")]
    Unknown,
}

/// A description.
pub(super) struct Btf {
    bytes: Vec<u8>,
    strings: usize,
    /// Where each type begins; type 0 is none.
    types: Vec<usize>,
    /// Structures and enumerations by name.
    names: BTreeMap<String, usize>,
}

/// The fixed part of a type.
struct Type {
    name: u32,
    kind: u32,
    /// Number of members.
    count: usize,
    /// Whether members are bit fields, and offsets have their sizes in the upper byte.
    bit_fields: bool,
    /// Where its members begin.
    members: usize,
}

impl Btf {
    /// That of the running kernel.
    pub(super) fn of_kernel() -> Result<Self, BtfError> {
        Self::parse(std::fs::read(PATH).map_err(BtfError::Read)?).ok_or(BtfError::Unknown)
    }

    fn parse(bytes: Vec<u8>) -> Option<Self> {
        let magic = bytes.get(..2)?.try_into().ok()?;
        if u16::from_ne_bytes(magic) != MAGIC {
            return None;
        }
        let header = word(&bytes, 4)? as usize;
        let place = |at| Some(word(&bytes, at)? as usize + header);
        let (mut at, strings) = (place(8)?, place(16)?);
        let end = at + word(&bytes, 12)? as usize;
        let mut btf = Self { bytes, strings, types: vec![0], names: BTreeMap::new() };
        while at < end {
            let described = btf.describe(at)?;
            if matches!(described.kind, STRUCT | UNION | ENUM) && described.name != 0 {
                let name = btf.string(described.name)?.to_owned();
                // The first one of a name is that of the core.
                btf.names.entry(name).or_insert(at);
            }
            btf.types.push(at);
            at = described.members + members_bytes(described.kind, described.count)?;
        }
        Some(btf)
    }

    /// Offset of a member, looked for in anonymous structures and unions too; nothing when there is none, or a bit field.
    pub(super) fn offset_bytes(&self, structure: &str, member: &str) -> Option<u32> {
        let bits = self.offset_bits(*self.names.get(structure)?, member, DEEPEST)?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    fn offset_bits(&self, at: usize, member: &str, depth: u32) -> Option<u32> {
        let described = self.describe(at)?;
        if !matches!(described.kind, STRUCT | UNION) {
            return None;
        }
        (0..described.count).find_map(|i| {
            let at = described.members + 12 * i;
            let (name, kind) = (word(&self.bytes, at)?, word(&self.bytes, at + 4)?);
            let offset = word(&self.bytes, at + 8)?;
            let offset = if described.bit_fields { offset & 0x00ff_ffff } else { offset };
            if name == 0 {
                let inner = *self.types.get(kind as usize)?;
                return Some(offset + self.offset_bits(inner, member, depth.checked_sub(1)?)?);
            }
            (self.string(name)? == member).then_some(offset)
        })
    }

    /// Names and numbers of an enumeration; empty when there is none.
    pub(super) fn enumerators(&self, name: &str) -> Vec<(String, u32)> {
        let Some(described) = self.names.get(name).and_then(|at| self.describe(*at)) else {
            return Vec::new();
        };
        if described.kind != ENUM {
            return Vec::new();
        }
        let one = |i| {
            let at = described.members + 8 * i;
            Some((self.string(word(&self.bytes, at)?)?.to_owned(), word(&self.bytes, at + 4)?))
        };
        (0..described.count).filter_map(one).collect()
    }

    fn describe(&self, at: usize) -> Option<Type> {
        let info = word(&self.bytes, at + 4)?;
        Some(Type {
            name: word(&self.bytes, at)?,
            kind: info >> 24 & 0x1f,
            count: (info & 0xffff) as usize,
            bit_fields: info >> 31 == 1,
            members: at + 12,
        })
    }

    fn string(&self, offset: u32) -> Option<&str> {
        let text = self.bytes.get(self.strings + offset as usize..)?;
        std::str::from_utf8(text.split(|byte| *byte == 0).next()?).ok()
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(word.try_into().ok()?))
}

/// Length of what follows the fixed part; nothing for a kind that we do not know, behind which nothing can be read.
fn members_bytes(kind: u32, count: usize) -> Option<usize> {
    Some(match kind {
        // INT, VAR, DECL_TAG
        1 | 14 | 17 => 4,
        // PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG
        2 | 7..=12 | 16 | 18 => 0,
        // ARRAY
        3 => 12,
        // STRUCT, UNION, DATASEC, ENUM64
        4 | 5 | 15 | 19 => 12 * count,
        // ENUM, FUNC_PROTO
        6 | 13 => 8 * count,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct outer { int a; union { int b; struct { char c[3]; int d; }; }; }; enum reason { ZERO, ONE = 7 };`
    fn sample() -> Vec<u8> {
        let strings = b"\0int\0outer\0a\0b\0d\0reason\0ZERO\0ONE\0";
        let at = |name: &str| {
            let place = strings.windows(name.len() + 2).position(|w| {
                w[0] == 0 && w[w.len() - 1] == 0 && &w[1..w.len() - 1] == name.as_bytes()
            });
            u32::try_from(place.unwrap() + 1).unwrap()
        };
        let info = |kind: u32, count: u32| kind << 24 | count;
        let types: Vec<u32> = [
            vec![at("int"), info(1, 0), 4, 32],
            vec![0, info(STRUCT, 1), 8, at("d"), 1, 32],
            vec![0, info(UNION, 2), 8, at("b"), 1, 0, 0, 2, 0],
            vec![at("outer"), info(STRUCT, 2), 12, at("a"), 1, 0, 0, 3, 32],
            vec![at("reason"), info(ENUM, 2), 4, at("ZERO"), 0, at("ONE"), 7],
        ]
        .concat();
        let types_bytes = u32::try_from(types.len() * 4).unwrap();
        let mut bytes = MAGIC.to_ne_bytes().to_vec();
        bytes.extend([1, 0]);
        let length = u32::try_from(strings.len()).unwrap();
        for word in [24, 0, types_bytes, types_bytes, length].iter().chain(&types) {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn members_of_anonymous_structures_are_found() {
        let btf = Btf::parse(sample()).unwrap();
        let offset = |member| btf.offset_bytes("outer", member);
        assert_eq!((offset("a"), offset("b"), offset("d")), (Some(0), Some(4), Some(8)));
        assert_eq!((offset("x"), btf.offset_bytes("nothing", "a")), (None, None));
    }

    #[test]
    fn enumerators_have_their_numbers() {
        let btf = Btf::parse(sample()).unwrap();
        let all = [("ZERO".to_owned(), 0), ("ONE".to_owned(), 7)];
        assert_eq!(btf.enumerators("reason"), all);
        assert_eq!(btf.enumerators("outer"), []);
    }

    #[test]
    fn what_was_cut_off_is_refused_or_says_less() {
        let whole = sample();
        assert!(Btf::parse(whole[..whole.len() / 2].to_vec()).is_none());
        assert!(Btf::parse(vec![0; 64]).is_none());
        assert!(Btf::parse(Vec::new()).is_none());
    }
}
