//! A clock that the test moves.
//!
//! boringtun reads the boot-time clock inside. This binary therefore brings its own `clock_gettime`: the kernel's, plus
//! what the thread has let pass. The linker prefers it to the one of libc, for this test binary only.

use std::cell::Cell;
use std::time::Duration;

thread_local! {
    static PASSED_NANOS: Cell<u64> = const { Cell::new(0) };
}

/// Lets time pass on this thread.
pub(crate) fn advance(time: Duration) {
    PASSED_NANOS.with(|passed| passed.set(passed.get() + time.as_nanos() as u64));
}

/// Replaces libc's function of the same name.
///
/// # Safety
/// As clock_gettime(2): `time` points to a timespec that may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(
    clock: libc::clockid_t,
    time: *mut libc::timespec,
) -> libc::c_int {
    // SAFETY: the caller's pointer goes to the system call that it was meant for.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) } as libc::c_int;
    if result == 0 && matches!(clock, libc::CLOCK_MONOTONIC | libc::CLOCK_BOOTTIME) {
        let passed = PASSED_NANOS.try_with(Cell::get).unwrap_or(0);
        // SAFETY: the system call succeeded, so the pointer is good and the value initialised.
        let time = unsafe { &mut *time };
        let nanos = time.tv_nsec as u64 + passed % 1_000_000_000;
        time.tv_sec += (passed / 1_000_000_000 + nanos / 1_000_000_000) as i64;
        time.tv_nsec = (nanos % 1_000_000_000) as i64;
    }
    result
}
