//! How much stack the eBPF programs take, counted as the verifier of Linux 6.1 does: each frame rounded up to 32 bytes, all frames of a
//! chain of calls together (`check_max_stack_depth` of `kernel/bpf/verifier.c`). Newer kernels count less where they compile the
//! program themselves, so that one loads here may be refused there.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use object::{
    Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget, SectionIndex,
    SectionKind, SymbolKind,
};

/// Bytes that a chain of calls may take.
const STACK: u32 = 512;
/// What a frame is rounded up to; each takes at least one.
const FRAME: u32 = 32;
/// Frames that a chain may have.
const FRAMES: u32 = 8;
/// Where functions lie that are no programs.
const TEXT: &str = ".text";

/// Section and offset.
type Place = (usize, u64);

/// What a function costs by itself.
#[derive(Debug, Default)]
struct Function {
    name: String,
    /// Bytes below its frame pointer.
    stack: u32,
    calls: BTreeSet<Place>,
}

/// The costliest chain of calls from somewhere on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Chain {
    /// What it takes.
    pub(crate) bytes: u32,
    frames: u32,
    names: Vec<String>,
}

/// Checks all programs of an object; the costliest chain of all.
pub(crate) fn check(object: &[u8]) -> Result<Chain> {
    let file = object::File::parse(object).context("read the eBPF object")?;
    let mut functions = BTreeMap::new();
    for section in file.sections().filter(|section| section.kind() == SectionKind::Text) {
        read_section(&file, &section, &mut functions)?;
    }
    let text = file.section_by_name(TEXT).map(|section| section.index().0);
    let programs = functions.keys().filter(|(section, _)| Some(*section) != text);
    let (mut known, mut worst) = (BTreeMap::new(), Chain::default());
    for program in programs {
        let chain = deepest(&functions, *program, &mut known, &mut Vec::new())?;
        let Chain { bytes, frames, names } = &chain;
        let way = || names.join(" > ");
        ensure!(*bytes <= STACK, "{bytes} bytes of stack, {STACK} are allowed: {}", way());
        ensure!(*frames <= FRAMES, "{frames} calls in a chain, {FRAMES} are allowed: {}", way());
        if *bytes > worst.bytes {
            worst = chain;
        }
    }
    ensure!(worst.bytes > 0, "there is no program in the eBPF object");
    Ok(worst)
}

fn read_section<'d>(
    file: &object::File<'d>,
    section: &object::Section<'d, '_>,
    functions: &mut BTreeMap<Place, Function>,
) -> Result<()> {
    let index = section.index().0;
    let code = section.data().context("read a section of the eBPF object")?;
    let mut moved = BTreeMap::new();
    for (at, relocation) in section.relocations() {
        if let RelocationTarget::Symbol(symbol) = relocation.target() {
            let symbol = file.symbol_by_index(symbol).context("find a symbol")?;
            let is_code = symbol.section_index().is_some_and(|target| {
                file.section_by_index(target).is_ok_and(|s| s.kind() == SectionKind::Text)
            });
            if is_code {
                let place = |section: SectionIndex| (at, (section.0, symbol.address()));
                moved.extend(symbol.section_index().map(place));
            }
        }
    }
    for symbol in file.symbols() {
        if symbol.kind() != SymbolKind::Text || symbol.section_index() != Some(section.index()) {
            continue;
        }
        let (start, end) = (symbol.address(), symbol.address() + symbol.size());
        let bytes = usize::try_from(start)?..usize::try_from(end)?;
        let bytes = code.get(bytes).context("a function ends behind its section")?;
        let name = symbol.name().context("read a name")?.to_owned();
        let function = Reader { index, start, moved: &moved }.function(name, bytes);
        functions.insert((index, start), function);
    }
    Ok(())
}

/// An instruction, as it lies there (RFC 9669, section 3).
struct Instruction {
    code: u8,
    destination: u8,
    source: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    fn read(bytes: &[u8]) -> Option<Self> {
        let &[code, registers, o0, o1, i0, i1, i2, i3] = bytes else { return None };
        Some(Self {
            code,
            destination: registers & 0xf,
            source: registers >> 4,
            offset: i16::from_le_bytes([o0, o1]),
            immediate: i32::from_le_bytes([i0, i1, i2, i3]),
        })
    }
}

const FRAME_POINTER: u8 = 10;
// Classes, in the lower three bits.
const LDX: u8 = 1;
const ST: u8 = 2;
const STX: u8 = 3;
const JMP: u8 = 5;
const JMP32: u8 = 6;
// Whole codes.
const ADD: u8 = 0x07;
const MOVE: u8 = 0xbf;
const CALL: u8 = 0x85;
/// In the place of the source register: the call is to a function of the object.
const TO_FUNCTION: u8 = 1;

struct Reader<'r> {
    index: usize,
    start: u64,
    /// Symbols that are put into instructions when the object is loaded.
    moved: &'r BTreeMap<u64, Place>,
}

impl Reader<'_> {
    fn function(&self, name: String, code: &[u8]) -> Function {
        let mut function = Function { name, ..Function::default() };
        // Registers that point into the frame: how far below its end.
        let mut places: BTreeMap<u8, i32> = [(FRAME_POINTER, 0)].into();
        let mut at = self.start;
        for bytes in code.chunks(8) {
            if let Some(instruction) = Instruction::read(bytes) {
                let lowest = step(&instruction, &mut places);
                function.stack = function.stack.max(lowest.min(0).unsigned_abs());
                function.calls.extend(self.target(&instruction, at));
            }
            at += 8;
        }
        function
    }

    /// The function that is called, or whose address is taken: what calls back has a frame, too.
    fn target(&self, instruction: &Instruction, at: u64) -> Option<Place> {
        let call = instruction.code == CALL && instruction.source == TO_FUNCTION;
        if let Some((section, address)) = self.moved.get(&at) {
            let beyond = if call { (i64::from(instruction.immediate) + 1) * 8 } else { 0 };
            return Some((*section, address.checked_add_signed(beyond)?));
        }
        let jump = (i64::from(instruction.immediate) + 1) * 8;
        if call { Some((self.index, at.checked_add_signed(jump)?)) } else { None }
    }
}

/// Follows what points into the frame; the lowest place that the instruction names, or 0.
fn step(instruction: &Instruction, places: &mut BTreeMap<u8, i32>) -> i32 {
    let Instruction { code, destination, source, offset, immediate } = instruction;
    let place = |register: &u8| places.get(register).copied();
    let access = |register: &u8| place(register).map_or(0, |place| place + i32::from(*offset));
    let class = code & 7;
    let (result, lowest) = match (class, *code) {
        (_, CALL) => {
            // Arguments and the result are lost.
            places.retain(|register, _| *register > 5);
            return 0;
        }
        (JMP | JMP32, _) => return 0,
        (ST | STX, _) => return access(destination),
        (LDX, _) => (None, access(source)),
        (_, MOVE) => (place(source), 0),
        (_, ADD) => {
            let moved = place(destination).map(|place| place + immediate);
            (moved, moved.unwrap_or(0))
        }
        _ => (None, 0),
    };
    match result {
        Some(place) => drop(places.insert(*destination, place)),
        None if *destination != FRAME_POINTER => drop(places.remove(destination)),
        None => {}
    }
    lowest
}

/// The costliest chain from a function on. `above` are those that lead to it.
fn deepest(
    functions: &BTreeMap<Place, Function>,
    from: Place,
    known: &mut BTreeMap<Place, Chain>,
    above: &mut Vec<Place>,
) -> Result<Chain> {
    if let Some(chain) = known.get(&from) {
        return Ok(chain.clone());
    }
    let function = functions.get(&from).context("a call leads to no function")?;
    ensure!(!above.contains(&from), "{} calls itself", function.name);
    above.push(from);
    let (mut below, mut frames) = (Chain::default(), 0);
    for call in &function.calls {
        let chain = deepest(functions, *call, known, above)?;
        frames = frames.max(chain.frames);
        if chain.bytes > below.bytes {
            below = chain;
        }
    }
    above.pop();
    let own = function.stack.max(1).next_multiple_of(FRAME);
    let mut names = vec![format!("{} {own}", function.name)];
    names.extend(below.names);
    let chain = Chain { bytes: below.bytes + own, frames: frames + 1, names };
    known.insert(from, chain.clone());
    Ok(chain)
}

#[cfg(test)]
mod tests;
