use object::write::{Object, Relocation, SectionId, Symbol, SymbolId, SymbolSection};
use object::{
    Architecture, BinaryFormat, Endianness, RelocationFlags, SymbolFlags, SymbolScope, elf,
};

use super::*;

const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];

/// `*(u64 *)(r10 - depth) = r1`
fn store(depth: i16) -> [u8; 8] {
    let [low, high] = (-depth).to_le_bytes();
    [0x7b, 0x1a, low, high, 0, 0, 0, 0]
}

/// `r2 = r10; r2 += -depth`: what a helper is given.
fn buffer(depth: i32) -> Vec<u8> {
    let [a, b, c, d] = (-depth).to_le_bytes();
    vec![0xbf, 0xa2, 0, 0, 0, 0, 0, 0, 0x07, 0x02, 0, 0, a, b, c, d]
}

/// A call, as many instructions further than the next.
fn call(further: i32) -> [u8; 8] {
    let [a, b, c, d] = further.to_le_bytes();
    [0x85, 0x10, 0, 0, a, b, c, d]
}

/// An object to be: a program, and what it calls.
struct Build(Object<'static>, BTreeMap<String, SectionId>);

impl Build {
    fn new() -> Self {
        let object = Object::new(BinaryFormat::Elf, Architecture::Bpf, Endianness::Little);
        Self(object, BTreeMap::new())
    }

    fn function(&mut self, section: &str, name: &str, code: &[u8]) -> SymbolId {
        let Self(object, sections) = self;
        let id = *sections.entry(section.to_owned()).or_insert_with(|| {
            object.add_section(vec![], section.as_bytes().to_vec(), SectionKind::Text)
        });
        let symbol = self.0.add_symbol(Symbol {
            name: name.as_bytes().to_vec(),
            value: 0,
            size: 0,
            kind: SymbolKind::Text,
            scope: SymbolScope::Linkage,
            weak: false,
            section: SymbolSection::Undefined,
            flags: SymbolFlags::None,
        });
        self.0.add_symbol_data(symbol, id, code, 8);
        symbol
    }

    /// Lets the call at `offset` of a section lead to a symbol.
    fn lead(&mut self, section: &str, offset: u64, symbol: SymbolId) {
        let id = self.1[section];
        let flags = RelocationFlags::Elf { r_type: elf::R_BPF_64_32 };
        self.0.add_relocation(id, Relocation { offset, symbol, addend: 0, flags }).unwrap();
    }

    fn checked(self) -> Result<Chain> {
        check(&self.0.write().unwrap())
    }
}

/// A program of 16 bytes that calls a function, by relocation, which calls the next one right behind it.
fn chain(middle: &[u8], last: &[u8]) -> Build {
    let mut build = Build::new();
    let code = [middle, &call(1), &EXIT].concat();
    let called = build.function(TEXT, "middle", &code);
    build.function(TEXT, "last", &[last, &EXIT].concat());
    build.function("classifier", "program", &[&store(16)[..], &call(-1), &EXIT].concat());
    build.lead("classifier", 8, called);
    build
}

#[test]
fn frames_are_rounded_up_and_added_along_the_calls() {
    let found = chain(&store(33), &buffer(200)).checked().unwrap();
    assert_eq!((found.bytes, found.frames), (32 + 64 + 224, 3));
    assert_eq!(found.names, ["program 32", "middle 64", "last 224"]);
    // A frame that is not used is one all the same.
    assert_eq!(chain(&[], &[]).checked().unwrap().bytes, 96);
}

#[test]
fn too_much_is_refused_with_the_way_there() {
    chain(&store(224), &buffer(256)).checked().unwrap();
    let error = chain(&store(225), &buffer(256)).checked().unwrap_err().to_string();
    assert_eq!(error, "544 bytes of stack, 512 are allowed: program 32 > middle 256 > last 256");
}

#[test]
fn too_many_frames_are_refused() {
    let mut build = Build::new();
    for n in 0..7 {
        build.function(TEXT, &format!("f{n}"), &[call(1), EXIT].concat());
    }
    build.function(TEXT, "end", &EXIT);
    build.function("classifier", "program", &[call(-1), EXIT].concat());
    let first = build.0.symbol_id(b"f0").unwrap();
    build.lead("classifier", 0, first);
    let error = build.checked().unwrap_err().to_string();
    assert!(error.starts_with("9 calls in a chain, 8 are allowed"), "{error}");
}

#[test]
fn what_a_register_was_before_does_not_count() {
    // r2 = r10; r2 = 0; r2 += -300: no place in the frame.
    let other = [&buffer(0)[..8], &[0xb7, 0x02, 0, 0, 0, 0, 0, 0], &buffer(300)[8..]].concat();
    let found = chain(&other, &[]).checked().unwrap();
    assert_eq!(found.bytes, 96);
}

#[test]
fn the_call_through_the_section_is_followed_too() {
    let mut build = Build::new();
    build.function(TEXT, "first", &EXIT);
    build.function(TEXT, "second", &[store(100), EXIT].concat());
    // One instruction into the section: the immediate says how far, less one.
    build.function("classifier", "program", &[call(0), EXIT].concat());
    let text = build.1[TEXT];
    let symbol = build.0.section_symbol(text);
    build.lead("classifier", 0, symbol);
    assert_eq!(build.checked().unwrap().names, ["program 32", "second 128"]);
}
