//! Network policy: who may speak to whom, by connection.
//!
//! The side that began a connection needs permission to send, the side that is spoken to has to accept; answers need neither.
//! Both are asked with the first packet, and again with the first after the policies have changed.

use aya_ebpf::EbpfContext;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::TcContext;
use mesh_abi::policy::{ANYBODY, OPEN, OTHER_NODE, THIS_NODE};
use mesh_abi::{Address, Connection, PodPolicy, Reason, RuleKey, RuleMatch};

use crate::connection::{
    self, Asked, EITHER, FIRST_FRAGMENT, LATER_FRAGMENT, RECEIVER, RELATED, Scratch, advance,
};
use crate::maps::{
    ALLOWED, IDENTITIES, POD_POLICIES, POD_PORTS, POLICY_BLOCKS, POLICY_RULES, POLICY_STATE,
};
use crate::trace;

/// The two ends of a packet's way on this node.
#[derive(Clone, Copy)]
pub struct Ends {
    /// The host-side veth of the pod that sent it; 0 when none of this node did. Where it is also `unproven`, the pod sent it to an address
    /// of the node, and what it may hear has no say: answers come from that address.
    pub sender: u32,
    /// The host-side veth of the pod that gets it; 0 when none of this node does.
    pub receiver: u32,
    /// Whether a process of the node sent it: that is always allowed.
    pub trusted: bool,
    /// Whether it came from elsewhere by a way on which nobody vouches for its source. One that says that it is a node may be
    /// somebody whom the node's address hides: a pod that uses a host port, or a liar.
    pub unproven: bool,
}

/// Whether the packet may go on. `network` is the place of its IP header. Costs the read of two words and a byte while there are no
/// policies and nobody traces; of protocols without a handshake also a look at who began the flow.
#[inline(always)]
pub fn admit(ctx: &TcContext, network: usize, ethertype: u16, ends: Ends) -> Result<(), Reason> {
    let verdict = judged(ctx, network, ethertype, ends);
    trace::after_policy(verdict);
    verdict
}

#[inline(always)]
fn judged(ctx: &TcContext, network: usize, ethertype: u16, ends: Ends) -> Result<(), Reason> {
    let Some((from, to, generation)) = restrictions(ends) else {
        if !ends.trusted {
            connection::note(ctx.skb.skb, network as u32, u32::from(ethertype));
        }
        return Ok(());
    };
    let scratch = connection::scratch().ok_or(Reason::NoRoom)?;
    if !connection::parse(ctx, &mut scratch.packet, network as u32, ethertype) {
        return Err(Reason::Malformed);
    }
    judge(ctx, scratch, from, to, generation, ends)
}

/// The policies of both ends, and the generation of the tables; nothing where nothing is restricted.
#[inline(always)]
fn restrictions(ends: Ends) -> Option<(PodPolicy, PodPolicy, u32)> {
    let state = POLICY_STATE.get(0).filter(|state| state.active != 0)?;
    // Read before anything that it stands for: what is found below may be newer than it says, never older.
    // SAFETY: a valid reference.
    let generation = unsafe { (&raw const state.generation).read_volatile() };
    let (mut from, to) = (policies(ends.sender), policies(ends.receiver));
    if ends.unproven {
        from.ingress = OPEN;
    }
    let open = from == PodPolicy::OPEN && to == PodPolicy::OPEN;
    (!open).then_some((from, to, generation))
}

#[inline(always)]
fn policies(ifindex: u32) -> PodPolicy {
    if ifindex == 0 {
        return PodPolicy::OPEN;
    }
    // SAFETY: the value is copied; user space replaces it as a whole.
    unsafe { POD_POLICIES.get(&ifindex) }.copied().unwrap_or(PodPolicy::PENDING)
}

#[inline(always)]
fn judge(
    ctx: &TcContext,
    scratch: &mut Scratch,
    from: PodPolicy,
    to: PodPolicy,
    generation: u32,
    ends: Ends,
) -> Result<(), Reason> {
    let trusted = ends.trusted;
    let now = connection::now_secs();
    if scratch.packet.flags & LATER_FRAGMENT != 0 {
        return match trusted || connection::follows_fragment(scratch, now) {
            true => Ok(()),
            false => Err(Reason::PolicyFragment),
        };
    }
    let origin = connection::locate(ctx.skb.skb, scratch, now);
    if origin == RELATED {
        return Ok(());
    }
    // The side that began needs permission to send, the one that it spoke to has to accept.
    let forth = (from.egress, to.ingress);
    let back = (to.egress, from.ingress);
    let (egress, ingress) = if origin == RECEIVER { back } else { forth };
    scratch.asked = Asked { egress, ingress, egress_rule: 0, ingress_rule: 0 };
    let begins = origin != RECEIVER && scratch.entry.ingress != generation;
    if ends.unproven && begins && refuses_hidden(scratch, to.ingress) != 0 {
        return Err(Reason::PolicyIngress);
    }
    if !trusted {
        let answer = evaluate(scratch, egress, ingress, generation);
        if answer != ALLOWED_BY_BOTH {
            connection::keep(scratch, now);
        }
        refusal(answer)?;
        if origin == EITHER {
            scratch.key = scratch.reversed;
            refusal(evaluate(scratch, back.0, back.1, generation))?;
            scratch.key = scratch.packet.key;
        }
    }
    let Connection { egress: egress_asked, ingress: ingress_asked, state, .. } = scratch.entry;
    let fresh = Connection {
        egress: if egress == OPEN { egress_asked } else { generation },
        ingress: if ingress == OPEN { ingress_asked } else { generation },
        seen_secs: now,
        state: advance(state, scratch.packet.flags, origin != RECEIVER),
    };
    // Once a second at most: other CPUs read it, too.
    if fresh != scratch.entry {
        scratch.entry = fresh;
        connection::remember(scratch);
    }
    if scratch.packet.flags & FIRST_FRAGMENT != 0 {
        connection::remember_fragment(scratch, now);
    }
    Ok(())
}

/// Whether the packet says that it is from a node, and only nodes are let in by the policy: of this one everybody has to be, of
/// another one its address.
#[inline(never)]
fn refuses_hidden(scratch: &mut Scratch, ingress: u32) -> u32 {
    if ingress == OPEN {
        return 0;
    }
    let key = &scratch.packet.key;
    let (protocol, port_be) = (u32::from(key.protocol), u32::from(key.destination_port_be));
    // SAFETY: the value is copied.
    match unsafe { IDENTITIES.get(&key.source) }.copied() {
        Some(THIS_NODE) => {}
        Some(OTHER_NODE) => {
            if by_range(ingress, &key.source, protocol, port_be) != 0 {
                return 0;
            }
        }
        _ => return 0,
    }
    u32::from(rule(ingress, ANYBODY, protocol, port_be) == 0)
}

#[inline(always)]
fn refusal(answer: u32) -> Result<(), Reason> {
    match answer {
        ALLOWED_BY_BOTH => Ok(()),
        NOT_SENT => Err(Reason::PolicyEgress),
        _ => Err(Reason::PolicyIngress),
    }
}

const ALLOWED_BY_BOTH: u32 = 0;
const NOT_SENT: u32 = 1;
const NOT_ACCEPTED: u32 = 2;

/// Asks both policies about the connection, but for those that were asked already.
#[inline(never)]
fn evaluate(scratch: &mut Scratch, egress: u32, ingress: u32, generation: u32) -> u32 {
    if egress != OPEN && scratch.entry.egress != generation {
        scratch.question.other = scratch.key.destination;
        let rule = ask(scratch, egress, generation);
        scratch.asked.egress_rule = rule;
        if rule == 0 {
            return NOT_SENT;
        }
    }
    if ingress != OPEN && scratch.entry.ingress != generation {
        scratch.question.other = scratch.key.source;
        let rule = ask(scratch, ingress, generation);
        scratch.asked.ingress_rule = rule;
        if rule == 0 {
            return NOT_ACCEPTED;
        }
    }
    ALLOWED_BY_BOTH
}

/// What a policy is asked: whether it allows that other side on that port.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Question {
    policy: u32,
    port_be: u16,
    protocol: u8,
    pad: u8,
    other: Address,
}

/// A rule that answered a question, and when.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Permission {
    generation: u32,
    rule: u32,
}

/// The rule that answered the question about `question.other` under this generation, or that answers it now. Only permission is kept:
/// what allows more does not raise the generation. Question and answer are in the CPU's own room: little stack is left here.
#[inline(never)]
fn ask(scratch: &mut Scratch, policy: u32, generation: u32) -> u32 {
    let Scratch { key, question, permission, .. } = scratch;
    (question.policy, question.pad) = (policy, 0);
    (question.port_be, question.protocol) = (key.destination_port_be, key.protocol);
    // SAFETY: the value is copied; entries are replaced as a whole.
    if let Some(known) = unsafe { ALLOWED.get(&*question) }.copied()
        && known.generation == generation
    {
        return known.rule;
    }
    let (protocol, port_be) = (u32::from(question.protocol), u32::from(question.port_be));
    let rule = allows(policy, &question.other, protocol, port_be);
    if rule != 0 {
        (permission.generation, permission.rule) = (generation, rule);
        // Without room the tables are asked again.
        let _ = ALLOWED.insert(&*question, &*permission, 0);
    }
    rule
}

/// The rule of the policy that allows that other side on that port: its number, [`THIS_NODE`] for what needs none, 0 for none. A
/// function of its own, with plain numbers, so that the programs have it once.
#[inline(never)]
fn allows(policy: u32, other: &Address, protocol: u32, port_be: u32) -> u32 {
    // SAFETY: the value is copied.
    let identity = unsafe { IDENTITIES.get(other) }.copied();
    if identity == Some(THIS_NODE) {
        return THIS_NODE;
    }
    if let Some(identity) = identity {
        let rule = rule(policy, identity, protocol, port_be);
        if rule != 0 {
            return rule;
        }
    }
    match by_range(policy, other, protocol, port_be) {
        0 => rule(policy, ANYBODY, protocol, port_be),
        rule => rule,
    }
}

/// The rule that allows the ranges that an address is in, or 0.
#[inline(always)]
fn by_range(policy: u32, other: &Address, protocol: u32, port_be: u32) -> u32 {
    let range = POLICY_BLOCKS.get(Key::new(128, *other));
    range.map_or(0, |identity| rule(policy, *identity, protocol, port_be))
}

#[inline(always)]
fn rule(policy: u32, identity: u32, protocol: u32, port_be: u32) -> u32 {
    let port = (port_be as u16).to_ne_bytes();
    let matches = RuleMatch { policy, identity, protocol: protocol as u8, port, pad: 0 };
    // Rules have numbers from `FIRST_FREE` on; one that had none would allow all the same.
    POLICY_RULES.get(Key::new(RuleKey::PORT_BITS, matches)).map_or(0, |rule| rule.number.max(1))
}

/// The device by which the packet came in; 0 when it was made on this node.
#[inline(always)]
pub fn came_by(ctx: &TcContext) -> u32 {
    let skb = ctx.as_ptr().cast::<aya_ebpf::bindings::__sk_buff>();
    // SAFETY: the kernel hands a valid context to the program.
    unsafe { (&raw const (*skb).ingress_ifindex).read_volatile() }
}

/// The host-side veth of a pod if the device is one, else 0.
#[inline(always)]
pub fn pod_behind(ifindex: u32) -> u32 {
    // SAFETY: only its presence matters.
    if unsafe { POD_PORTS.get(&ifindex) }.is_some() { ifindex } else { 0 }
}
