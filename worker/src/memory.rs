//! What the allocator keeps of memory that nobody uses.

/// Arenas of the whole process. The allocator would make one for each thread, up to eight for each processor, and each keeps pieces of what
/// its threads had for a moment: an agent that made and deleted pods held twice as much as with two.
const ARENAS: libc::c_int = 2;

/// Lets all threads allocate from few arenas. To be called before there are any.
pub fn share() {
    // SAFETY: sets one number of the allocator, under its own lock.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}

/// Gives free memory back to the kernel. The allocator does so by itself only where nothing in use lies behind it: after work that
/// took much and left little, most of it stays. Takes a millisecond for each few MiB, during which other threads wait for memory.
pub fn give_back() {
    // SAFETY: takes the allocator's own locks, and touches nothing that is in use. There is no other way to ask for it.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Anonymous memory of this process that is resident, in KiB.
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    #[test]
    fn what_lies_between_used_memory_is_given_back() {
        const BLOCK_BYTES: usize = 1 << 10;
        const TAKEN_KIB: usize = 128 << 10;
        // On a thread of its own, as work that blocks is done: with an arena of its own.
        let kept = std::thread::spawn(|| {
            let blocks: Vec<Vec<u8>> = (0..TAKEN_KIB).map(|_| vec![1; BLOCK_BYTES]).collect();
            blocks.into_iter().step_by(256).collect::<Vec<_>>()
        });
        let kept = kept.join().unwrap();
        let before = resident();
        give_back();
        let after = resident();
        assert!(before > after + TAKEN_KIB / 2, "{before} KiB, and then {after} KiB");
        assert!(kept.iter().all(|block| block.iter().all(|byte| *byte == 1)));
    }
}
