//! Additions that nothing comes in between. The library's atomics lack them on this target; the instructions are there since
//! Linux 5.12.

use core::arch::asm;

/// Adds one.
///
/// # Safety
/// An aligned word of a map's value, in reach for the rest of the program.
#[inline(always)]
pub unsafe fn increment(word: *mut u64) {
    // SAFETY: the caller's word.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) word, in(reg) 1_u64) }
}

/// Adds one.
///
/// # Safety
/// As for [`increment`].
#[inline(always)]
pub unsafe fn increment_word(word: *mut u32) {
    // SAFETY: the caller's word.
    unsafe { asm!("lock *(u32 *)({0} + 0) += {1}", in(reg) word, in(wreg) 1_u32) }
}

/// Takes what is there and leaves zero.
///
/// # Safety
/// As for [`increment`].
#[inline(always)]
pub unsafe fn take_word(word: *mut u32) -> u32 {
    let mut value = 0_u32;
    // SAFETY: the caller's word.
    unsafe { asm!("{1} = xchg32_32({0} + 0, {1})", in(reg) word, inout(wreg) value) }
    value
}

/// Writes `new` where zero is, and says whether it did.
///
/// # Safety
/// As for [`increment`].
#[inline(always)]
pub unsafe fn claim(word: *mut u64, new: u64) -> bool {
    let mut found = 0_u64;
    // SAFETY: the caller's word.
    unsafe {
        asm!("r0 = cmpxchg_64({0} + 0, r0, {1})", in(reg) word, in(reg) new, inout("r0") found);
    }
    found == 0
}
