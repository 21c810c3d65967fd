//! Choice of a backend.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_ktime_get_ns};
use aya_ebpf::programs::SockAddrContext;
use mesh_abi::{AffinityKey, AffinityValue, Member, MemberKey, Service, Slot, SlotKey};

use crate::maps::{AFFINITY, MEMBERS, SLOTS};

/// A backend of the service, or nothing when it has none.
#[inline(always)]
pub fn choose(ctx: &SockAddrContext, service: &Service) -> Option<Slot> {
    if service.affinity_secs == 0 { any(service) } else { sticky(ctx, service) }
}

/// Whether the backend still gets what is new of the service.
#[inline(always)]
pub fn is_member(service: u32, backend: Slot) -> bool {
    // SAFETY: one word, which user space replaces as a whole.
    let member = unsafe { MEMBERS.get(&MemberKey::new(service, backend)) };
    member.is_some_and(|member| member.flags & Member::LEAVING == 0)
}

#[inline(always)]
fn any(service: &Service) -> Option<Slot> {
    if service.count == 0 {
        return None;
    }
    // SAFETY: no arguments.
    let slot = unsafe { bpf_get_prandom_u32() } % service.count;
    // The list may have become shorter since its length was read: the first place is the last to go.
    at(service.id, slot).or_else(|| at(service.id, 0))
}

#[inline(always)]
fn at(service: u32, slot: u32) -> Option<Slot> {
    // SAFETY: the value is copied; user space replaces it as a whole.
    unsafe { SLOTS.get(&SlotKey { service, slot }) }.copied()
}

/// The backend that this client used last, if that was not too long ago and it is still a member.
#[inline(always)]
fn sticky(ctx: &SockAddrContext, service: &Service) -> Option<Slot> {
    // SAFETY: a valid context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let key = AffinityKey { netns, service: service.id, pad: 0 };
    // SAFETY: no arguments.
    let used_ns = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the value is copied; a torn read gives a backend that is no member.
    let kept = unsafe { AFFINITY.get(&key) }.copied().filter(|last| {
        let age_ns = used_ns.wrapping_sub(last.used_ns);
        age_ns < u64::from(service.affinity_secs) * 1_000_000_000
            && is_member(service.id, last.backend)
    });
    let backend = match kept {
        Some(last) => last.backend,
        None => any(service)?,
    };
    let _ = AFFINITY.insert(&key, &AffinityValue { used_ns, backend, pad: 0 }, 0);
    Some(backend)
}
