//! Objects that are broken on purpose: what the node has stays, and the reason is told.

use mesh_abi::programs as names;
use mesh_kernel::bpf::{LoadError, built_in_object};
use mesh_kernel::{LoadOptions, Programs};

use crate::lab::{Lab, names as files, privileged};

/// `r0 = -1`: pass everything.
const PASS: [u8; 8] = [0xb7, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];
/// First byte of an instruction that takes two places.
const LOAD_WIDE: u8 = 0x18;
/// First byte of a call, which the loader fills in.
const CALL: u8 = 0x85;

/// A number in an ELF file.
fn number<const N: usize>(elf: &[u8], at: usize) -> usize {
    let mut bytes = [0; 8];
    bytes[..N].copy_from_slice(&elf[at..at + N]);
    usize::try_from(u64::from_le_bytes(bytes)).unwrap()
}

/// Where the instructions of a program are in the object (ELF-64: section headers of 64 bytes, symbols of 24).
fn instructions(elf: &[u8], program: &str) -> std::ops::Range<usize> {
    let (table, count) = (number::<8>(elf, 40), number::<2>(elf, 60));
    let section = |i: usize| table + 64 * i;
    let place = |i| (number::<8>(elf, section(i) + 24), number::<8>(elf, section(i) + 32));
    let symbols = (0..count).find(|i| number::<4>(elf, section(*i) + 4) == 2).unwrap();
    let (strings, _) = place(number::<4>(elf, section(symbols) + 40));
    let (first, length) = place(symbols);
    let named = |at: &usize| {
        let name = &elf[strings + number::<4>(elf, *at)..];
        name.starts_with(program.as_bytes()) && name[program.len()] == 0
    };
    let symbol = (first..first + length).step_by(24).find(named).unwrap();
    let start = place(number::<2>(elf, symbol + 6)).0 + number::<8>(elf, symbol + 8);
    start..start + number::<8>(elf, symbol + 16)
}

/// The first place for two instructions of ours: the loader writes into none of those that are there.
fn place(elf: &[u8], code: &std::ops::Range<usize>) -> usize {
    let mut at = code.start;
    while [at, at + 8].iter().any(|at| matches!(elf[*at], LOAD_WIDE | CALL)) {
        at += if elf[at] == LOAD_WIDE { 16 } else { 8 };
        assert!(at + 16 < code.end, "a program computes");
    }
    at
}

/// How many instructions after that place the first exit is.
fn exit(elf: &[u8], place: usize) -> u16 {
    let mut at = place + 16;
    while elf[at..at + 8] != EXIT {
        at += if elf[at] == LOAD_WIDE { 16 } else { 8 };
    }
    u16::try_from((at - place - 16) / 8).unwrap()
}

/// The built-in object, with two instructions of a program exchanged.
fn broken(program: &str, changed: impl Fn(&[u8], usize) -> [[u8; 8]; 2]) -> Vec<u8> {
    let mut elf = built_in_object().to_vec();
    let code = instructions(&elf, program);
    let place = place(&elf, &code);
    let changed = changed(&elf, place).concat();
    elf[place..place + 16].copy_from_slice(&changed);
    elf
}

/// `if r0 == -1 goto exit`, which is always so: the verifier sees nothing wrong in a guard that lets everything pass.
fn passes_everything(program: &str) -> Vec<u8> {
    broken(program, |elf, place| {
        let [low, high] = exit(elf, place).to_le_bytes();
        [PASS, [0x15, 0, low, high, 0xff, 0xff, 0xff, 0xff]]
    })
}

/// Where links are pinned.
fn links(lab: &Lab) -> std::path::PathBuf {
    lab.bpf_dir().join(format!("v{}/links", mesh_abi::VERSION))
}

fn refused(lab: &Lab, object: Vec<u8>) -> LoadError {
    let options = LoadOptions { object: Some(object), ..lab.options() };
    Programs::open_or_load(&options).unwrap_err()
}

#[test]
fn a_guard_that_lets_everything_pass_never_gets_to_work() {
    if !privileged() {
        return;
    }
    let lab = Lab::new();
    let error = refused(&lab, passes_everything(names::FROM_POD));
    let text = error.to_string();
    assert!(matches!(error, LoadError::Golden { .. }), "{error:#?}");
    assert!(text.contains("from_pod") && text.contains("a pod to a pod beside it"), "{text}");
    let error = refused(&lab, passes_everything(names::FROM_OVERLAY));
    assert!(error.to_string().contains("the overlay to a pod"), "{error}");
    assert_eq!(files(&links(&lab)), [] as [&str; 0], "nothing was attached");
    // The same object unharmed is taken.
    lab.load();
}

#[test]
fn what_the_verifier_refuses_is_told_with_its_log() {
    if !privileged() {
        return;
    }
    let lab = Lab::new();
    let error = refused(&lab, broken(names::FROM_POD, |_, _| [PASS, EXIT]));
    let LoadError::Program { name, source } = &error else { panic!("{error:#?}") };
    assert_eq!(*name, names::FROM_POD);
    assert!(source.to_string().contains("unreachable insn"), "{source}");
}

#[test]
fn a_broken_object_leaves_the_working_one_attached() {
    if !privileged() {
        return;
    }
    let (lab, net) = (Lab::new(), crate::lab::Net::new());
    let pod = crate::lab::Net::new();
    let programs = std::sync::Arc::new(lab.load());
    let port = crate::pod_network::port(&pod, 5);
    let network = mesh_kernel::pods::LinuxPodNetwork::new(net.handle(), programs);
    mesh_kernel::PodNetwork::attach(&network, &port).unwrap();
    let device = port.host_interface.to_string();
    let before = net.command("tc", &format!("filter show dev {device} ingress"));
    assert!(before.contains("from_pod"), "{before}");
    let attached = files(&links(&lab));
    for object in
        [passes_everything(names::FROM_POD), broken(names::FROM_OVERLAY, |_, _| [PASS, EXIT])]
    {
        let options = LoadOptions { object: Some(object), node: net.handle(), ..lab.options() };
        Programs::open_or_load(&options).unwrap_err();
        assert_eq!(net.command("tc", &format!("filter show dev {device} ingress")), before);
        assert_eq!(files(&links(&lab)), attached);
    }
}
