//! Typed access to a pinned map.

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mesh_abi::Plain;

use super::bpffs::Pins;
use super::load::LoadError;
use super::sys;

/// A map with keys `K` and values `V`. Cheap to clone.
#[derive(Debug)]
pub(crate) struct Map<K, V> {
    name: &'static str,
    fd: Arc<OwnedFd>,
    capacity: u32,
    /// Number of entries, where who writes them all has said it; else [`UNKNOWN`].
    held: Arc<AtomicUsize>,
    types: PhantomData<fn() -> (K, V)>,
}

const UNKNOWN: usize = usize::MAX;

impl<K, V> Clone for Map<K, V> {
    fn clone(&self) -> Self {
        let (fd, held) = (Arc::clone(&self.fd), Arc::clone(&self.held));
        Self { name: self.name, fd, capacity: self.capacity, held, types: PhantomData }
    }
}

impl<K, V> Map<K, V> {
    fn new(name: &'static str, fd: OwnedFd, capacity: u32) -> Self {
        let held = Arc::new(AtomicUsize::new(UNKNOWN));
        Self { name, fd: Arc::new(fd), capacity, held, types: PhantomData }
    }

    /// Tells all clones how many entries there are, so that nobody has to list them. Only for maps with one writer.
    pub(crate) fn holds(&self, entries: usize) {
        self.held.store(entries, Ordering::Relaxed);
    }
}

#[repr(C)]
struct ElementAttr {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// Entries per system call when reading or writing many.
const BATCH: usize = 4096;

impl<K: Plain, V: Plain> Map<K, V> {
    /// Opens a pinned map and checks that it has the expected sizes: the path says the ABI version, but nothing enforces it.
    pub(super) fn open(pins: &Pins, name: &'static str) -> Result<Self, LoadError> {
        let path = pins.map(name);
        let fd = sys::open_pinned(&path).map_err(|source| LoadError::OpenMap { name, source })?;
        let info: sys::MapInfo =
            sys::info(fd.as_fd()).map_err(|source| LoadError::OpenMap { name, source })?;
        if (info.key_size as usize, info.value_size as usize) != (size_of::<K>(), size_of::<V>()) {
            return Err(LoadError::ForeignMap { name, path });
        }
        Ok(Self::new(name, fd, info.max_entries))
    }

    /// A map that is not pinned.
    pub(super) fn of(name: &'static str, fd: OwnedFd) -> io::Result<Self> {
        let info: sys::MapInfo = sys::info(fd.as_fd())?;
        if (info.key_size as usize, info.value_size as usize) != (size_of::<K>(), size_of::<V>()) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Self::new(name, fd, info.max_entries))
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// How many entries fit.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity as usize
    }

    fn element(&self, key: *const K, value: u64) -> ElementAttr {
        ElementAttr { map: sys::raw(self.fd.as_fd()), pad: 0, key: key as u64, value, flags: 0 }
    }

    /// Adds or replaces an entry.
    pub(crate) fn put(&self, key: &K, value: &V) -> io::Result<()> {
        let mut attr = self.element(key, std::ptr::from_ref(value) as u64);
        // SAFETY: key and value are plain data of the map's sizes, checked in `open`.
        unsafe { sys::bpf(sys::BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
    }

    /// Adds or replaces entries in order, many at once. Returns how many were written before one failed; none where the kernel
    /// cannot do that (before 5.6).
    pub(crate) fn put_many(&self, entries: impl IntoIterator<Item = (K, V)>) -> usize {
        let mut entries = entries.into_iter();
        let mut written = 0;
        let (mut keys, mut values) = (Vec::with_capacity(BATCH), Vec::with_capacity(BATCH));
        loop {
            keys.clear();
            values.clear();
            for (key, value) in entries.by_ref().take(BATCH) {
                keys.push(key);
                values.push(value);
            }
            if keys.is_empty() {
                return written;
            }
            let mut attr = BatchAttr {
                in_batch: 0,
                out_batch: 0,
                keys: keys.as_ptr() as u64,
                values: values.as_ptr() as u64,
                count: u32::try_from(keys.len()).expect("at most a small constant"),
                map: sys::raw(self.fd.as_fd()),
                element_flags: 0,
                flags: 0,
            };
            // SAFETY: both buffers hold `count` entries of the map's sizes, which the kernel only reads.
            match unsafe { sys::bpf(sys::BPF_MAP_UPDATE_BATCH, &mut attr) } {
                Ok(_) => written += keys.len(),
                // An old kernel leaves the count as it was.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return written,
                Err(_) => return written + (attr.count as usize).min(keys.len()),
            }
        }
    }

    /// The value of a key.
    pub(crate) fn lookup(&self, key: &K) -> io::Result<Option<V>> {
        let mut value = MaybeUninit::<V>::uninit();
        let mut attr = self.element(key, value.as_mut_ptr() as u64);
        // SAFETY: as above; the kernel fills the whole value when it succeeds.
        match unsafe { sys::bpf(sys::BPF_MAP_LOOKUP_ELEM, &mut attr) } {
            // SAFETY: filled, and any bit pattern is a value.
            Ok(_) => Ok(Some(unsafe { value.assume_init() })),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes an entry. Nothing there is success; returns whether there was one.
    pub(crate) fn delete(&self, key: &K) -> io::Result<bool> {
        let mut attr = self.element(key, 0);
        // SAFETY: as above.
        match unsafe { sys::bpf(sys::BPF_MAP_DELETE_ELEM, &mut attr) } {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Values of a key on all CPUs, for per-CPU maps.
    pub(crate) fn per_cpu(&self, key: &K) -> io::Result<Vec<V>> {
        let cpus = possible_cpus()?;
        // The kernel rounds each CPU's value up to 8 bytes.
        if !size_of::<V>().is_multiple_of(8) {
            return Err(io::Error::from(io::ErrorKind::Unsupported));
        }
        let mut values = Vec::<V>::with_capacity(cpus);
        let mut attr = self.element(key, values.as_mut_ptr() as u64);
        // SAFETY: there is room for one value per possible CPU, which is what the kernel writes.
        unsafe { sys::bpf(sys::BPF_MAP_LOOKUP_ELEM, &mut attr) }?;
        // SAFETY: the kernel has filled all of them.
        unsafe { values.set_len(cpus) };
        Ok(values)
    }

    /// All entries, in no order. What changes meanwhile may be missed or listed.
    pub(crate) fn entries(&self) -> io::Result<Vec<(K, V)>> {
        match self.batches() {
            // Maps without batches (longest prefix tables before 5.19, arrays): key by key.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | 524)) => {
                self.one_by_one()
            }
            other => other,
        }
    }

    /// All keys, in no order.
    pub(crate) fn keys(&self) -> io::Result<Vec<K>> {
        let (mut keys, mut last) = (Vec::new(), None);
        while let Some(next) = self.next_key(last.as_ref())? {
            keys.push(next);
            last = Some(next);
        }
        Ok(keys)
    }

    /// The key behind this one, or the first; nothing at the end.
    fn next_key(&self, key: Option<&K>) -> io::Result<Option<K>> {
        let mut next = MaybeUninit::<K>::uninit();
        let from = key.map_or(std::ptr::null(), std::ptr::from_ref);
        let mut attr = self.element(from, next.as_mut_ptr() as u64);
        // SAFETY: the key is plain data of the map's size or null, and there is room for the next one.
        match unsafe { sys::bpf(sys::BPF_MAP_GET_NEXT_KEY, &mut attr) } {
            // SAFETY: filled.
            Ok(_) => Ok(Some(unsafe { next.assume_init() })),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn batches(&self) -> io::Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        let mut keys = Vec::<K>::with_capacity(BATCH);
        let mut values = Vec::<V>::with_capacity(BATCH);
        // The cursor of a hash table is a bucket number; that of other maps is a key.
        let mut cursor = vec![0_u8; size_of::<K>().max(8)];
        let mut first = true;
        loop {
            let mut attr = BatchAttr {
                in_batch: if first { 0 } else { cursor.as_ptr() as u64 },
                out_batch: cursor.as_mut_ptr() as u64,
                keys: keys.as_mut_ptr() as u64,
                values: values.as_mut_ptr() as u64,
                count: u32::try_from(BATCH).expect("a small constant"),
                map: sys::raw(self.fd.as_fd()),
                element_flags: 0,
                flags: 0,
            };
            // SAFETY: both buffers have room for `count` entries, and the cursor for a key or a word.
            let result = unsafe { sys::bpf(sys::BPF_MAP_LOOKUP_BATCH, &mut attr) };
            let last = match &result {
                Ok(_) => false,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                Err(_) => return result.map(|_| Vec::new()),
            };
            // SAFETY: the kernel has filled `count` entries of both.
            unsafe {
                keys.set_len(attr.count as usize);
                values.set_len(attr.count as usize);
            }
            entries.extend(keys.drain(..).zip(values.drain(..)));
            if last {
                return Ok(entries);
            }
            first = false;
        }
    }

    fn one_by_one(&self) -> io::Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        for key in self.keys()? {
            if let Some(value) = self.lookup(&key)? {
                entries.push((key, value));
            }
        }
        Ok(entries)
    }

    /// Number of entries, and how many fit. Lists them where nobody has said how many there are.
    pub(crate) fn pressure(&self) -> io::Result<(usize, u32)> {
        let entries = match self.held.load(Ordering::Relaxed) {
            UNKNOWN => self.entries()?.len(),
            held => held,
        };
        Ok((entries, self.capacity))
    }

    /// The same for a map with large values, which are not read.
    pub(crate) fn pressure_by_keys(&self) -> io::Result<(usize, u32)> {
        Ok((self.keys()?.len(), self.capacity))
    }
}

/// How many entries a pinned map has room for.
pub(super) fn capacity_of(pins: &Pins, name: &str) -> io::Result<u32> {
    let fd = sys::open_pinned(&pins.map(name))?;
    let info: sys::MapInfo = sys::info(fd.as_fd())?;
    Ok(info.max_entries)
}

/// Number of CPUs that the kernel keeps per-CPU values for: the highest in `0-3` or `0,2-7`, plus one.
fn possible_cpus() -> io::Result<usize> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last =
        text.trim().rsplit([',', '-']).next().and_then(|number| number.parse::<usize>().ok());
    last.map(|number| number + 1).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}
