//! Many elements per system call, on maps of any kind, with single steps where the kernel has no batches.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::sys::{self, Command};

/// Elements per call.
const CHUNK: usize = 4096;
/// `ENOTSUPP`, the kernel's internal number that bpf(2) lets out for missing operations.
const ENOTSUPP: i32 = 524;

/// A map's file descriptor with the sizes that the kernel copies.
#[derive(Debug)]
pub(crate) struct Table {
    fd: OwnedFd,
    /// Bytes of a key.
    pub(crate) key: usize,
    /// Bytes of a value as bpf(2) copies it: for per-CPU maps the values of all possible CPUs.
    pub(crate) value: usize,
    /// Most elements that fit.
    pub(crate) entries: u32,
}

/// Where a batch of writes stopped.
#[derive(Debug)]
pub(crate) struct Stopped {
    /// Elements written before.
    pub(crate) done: usize,
    /// Why.
    pub(crate) error: io::Error,
}

impl Table {
    /// `cpus` is the number of possible CPUs for a per-CPU map, else 1.
    pub(crate) fn new(fd: OwnedFd, cpus: usize) -> io::Result<Self> {
        let info = sys::map_info(fd.as_fd())?;
        let value = if cpus == 1 { info.value as usize } else { (info.value as usize).next_multiple_of(8) * cpus };
        Ok(Self { fd, key: info.key as usize, value, entries: info.entries })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// One element, if there.
    pub(crate) fn get(&self, key: &[u8]) -> io::Result<Option<Vec<u8>>> {
        self.check(key, None)?;
        let mut value = vec![0; self.value];
        Ok(sys::lookup(self.fd(), key, &mut value)?.then_some(value))
    }

    pub(crate) fn put(&self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.check(key, Some(value))?;
        sys::update(self.fd(), key, value)
    }

    /// Adds an element unless it is there already; `false` where the map is full.
    pub(crate) fn add(&self, key: &[u8], value: &[u8]) -> io::Result<bool> {
        self.check(key, Some(value))?;
        match sys::insert(self.fd(), key, value) {
            Ok(()) => Ok(true),
            Err(error) => match error.raw_os_error() {
                Some(libc::EEXIST) => Ok(true),
                Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM) => Ok(false),
                _ => Err(error),
            },
        }
    }

    /// Whether there was such an element.
    pub(crate) fn remove(&self, key: &[u8]) -> io::Result<bool> {
        self.check(key, None)?;
        sys::delete(self.fd(), key)
    }

    fn check(&self, key: &[u8], value: Option<&[u8]>) -> io::Result<()> {
        let fits = key.len() == self.key && value.is_none_or(|value| value.len() == self.value);
        if fits { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
    }

    /// Calls `each` with all elements. What changes meanwhile may be seen or not.
    pub(crate) fn scan(&self, mut each: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
        let mut chunk = CHUNK.min(self.entries.max(1) as usize);
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        // The position of hashes is a bucket number (four bytes), that of other maps a key.
        let (mut from, mut to) = (vec![0; self.key.max(8)], vec![0; self.key.max(8)]);
        let mut first = true;
        loop {
            keys.resize(chunk * self.key, 0);
            values.resize(chunk * self.value, 0);
            let start = (!first).then_some(from.as_slice());
            let (count, result) = sys::batch(
                Command::LookupBatch,
                self.fd(),
                (start, Some(&mut to)),
                keys.as_ptr(),
                values.as_ptr(),
                chunk as u32,
            );
            let errno = result.as_ref().err().and_then(io::Error::raw_os_error);
            match (result, errno) {
                // The next bucket alone holds more than fits.
                (Err(_), Some(libc::ENOSPC)) if chunk < 1 << 20 => {
                    chunk *= 2;
                    continue;
                }
                (Err(_), Some(libc::EINVAL | ENOTSUPP)) if first => return self.scan_slowly(each),
                (Err(error), code) if code != Some(libc::ENOENT) => return Err(error),
                (result, _) => {
                    let pairs = keys.chunks_exact(self.key).zip(values.chunks_exact(self.value));
                    pairs.take(count as usize).for_each(|(key, value)| each(key, value));
                    if result.is_err() || count == 0 {
                        return Ok(());
                    }
                }
            }
            first = false;
            std::mem::swap(&mut from, &mut to);
        }
    }

    /// [`Self::scan`] one by one, for kernels and maps without batches.
    pub(crate) fn scan_slowly(&self, mut each: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
        let (mut key, mut next) = (None::<Vec<u8>>, vec![0; self.key]);
        let mut value = vec![0; self.value];
        // A key deleted meanwhile makes the kernel start over: bounded, so that a busy map cannot hold us.
        for _ in 0..u64::from(self.entries) * 2 {
            if !sys::next_key(self.fd(), key.as_deref(), &mut next)? {
                break;
            }
            if sys::lookup(self.fd(), &next, &mut value)? {
                each(&next, &value);
            }
            key = Some(next.clone());
        }
        Ok(())
    }

    /// Writes elements given as concatenated keys and values.
    pub(crate) fn put_all(&self, keys: &[u8], values: &[u8]) -> Result<(), Stopped> {
        let total = keys.len() / self.key;
        let mut done = 0;
        while done < total {
            let count = (total - done).min(CHUNK);
            let (key, value) = (&keys[done * self.key..], &values[done * self.value..]);
            if count == 1 {
                self.put(&key[..self.key], &value[..self.value]).map_err(|error| Stopped { done, error })?;
                done += 1;
                continue;
            }
            let none = (None, None);
            let (written, result) =
                sys::batch(Command::UpdateBatch, self.fd(), none, key.as_ptr(), value.as_ptr(), count as u32);
            match result {
                Ok(()) => done += count,
                Err(error) if missing(&error) => return self.put_slowly(keys, values, done),
                Err(error) => return Err(Stopped { done: done + written as usize, error }),
            }
        }
        Ok(())
    }

    fn put_slowly(&self, keys: &[u8], values: &[u8], from: usize) -> Result<(), Stopped> {
        let pairs = keys.chunks_exact(self.key).zip(values.chunks_exact(self.value)).enumerate();
        for (done, (key, value)) in pairs.skip(from) {
            self.put(key, value).map_err(|error| Stopped { done, error })?;
        }
        Ok(())
    }

    /// Deletes elements given as concatenated keys; missing ones are no error. Returns how many there were.
    pub(crate) fn remove_all(&self, keys: &[u8]) -> Result<usize, Stopped> {
        let total = keys.len() / self.key;
        let (mut done, mut removed) = (0, 0);
        while done < total {
            let count = (total - done).min(CHUNK);
            let key = &keys[done * self.key..];
            let (deleted, result) = if count == 1 {
                match self.remove(&key[..self.key]) {
                    Ok(true) => (1, Ok(())),
                    Ok(false) => (0, Err(io::Error::from_raw_os_error(libc::ENOENT))),
                    Err(error) => (0, Err(error)),
                }
            } else {
                sys::batch(Command::DeleteBatch, self.fd(), (None, None), key.as_ptr(), std::ptr::null(), count as u32)
            };
            match result {
                Ok(()) => {
                    done += count;
                    removed += count;
                }
                // The kernel stops at a key that is not there: go on behind it.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    done += deleted as usize + 1;
                    removed += deleted as usize;
                }
                Err(error) if missing(&error) => return self.remove_slowly(keys, done, removed),
                Err(error) => return Err(Stopped { done: done + deleted as usize, error }),
            }
        }
        Ok(removed)
    }

    fn remove_slowly(&self, keys: &[u8], from: usize, mut removed: usize) -> Result<usize, Stopped> {
        for (done, key) in keys.chunks_exact(self.key).enumerate().skip(from) {
            removed += usize::from(self.remove(key).map_err(|error| Stopped { done, error })?);
        }
        Ok(removed)
    }
}

/// Whether the kernel has no batches for this map.
fn missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | ENOTSUPP))
}
