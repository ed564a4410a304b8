//! What the process takes of its node beyond the work itself: memory that only its start needed, memory that was freed but
//! not given back, and how long it waits for a processor.
//!
//! What the kernel refuses here is no error: all goes on as it would have. Deliberately absent: any share of the processor
//! beyond what an ordinary process has, and anything about memory that holds data.

// Linked for [`collect`]; whether it is the allocator decides the binary.
use mimalloc as _;

use std::cell::Cell;
use std::ffi::{CStr, c_int, c_void};
use std::io;
use std::time::{Duration, Instant};

/// The shortest time slice that the kernel grants an ordinary thread (`__setparam_fair`).
const SLICE_NANOS: u64 = 100_000;

/// `struct sched_attr`, sched_setattr(2), in its first version.
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Asks for short time slices, for this thread and those that it starts: not for more of the processor, but for it sooner
/// and in smaller parts. A change of an endpoint takes some microseconds and should not stand in line behind those who
/// compute for milliseconds. Kernels before 6.12 take the request and ignore it.
///
/// # Errors
/// What the kernel, or a seccomp filter, answers.
pub fn run_in_short_slices() -> io::Result<()> {
    let mut attr = SchedAttr { size: size_of::<SchedAttr>() as u32, ..SchedAttr::default() };
    // SAFETY: the kernel writes at most `size` bytes into a structure of that size, whose fields take any value.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, attr.size, 0) })?;
    attr.runtime = SLICE_NANOS;
    // SAFETY: the kernel reads the structure that it has just filled in, policy and niceness as they are.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) })
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Unmaps the pages of the program and its libraries that are in the page cache as they are in their files. What runs
/// next comes back from there by itself, 64 KiB at a time and without reading a disk; the reader of the command line, the
/// loader and whatever else only a start needs does not. To be called when the start is over.
pub fn forget_start() {
    // SAFETY: the callback keeps to the contract of dl_iterate_phdr(3), and unwinds never (it does not panic).
    unsafe { libc::dl_iterate_phdr(Some(forget_object), std::ptr::null_mut()) };
}

unsafe extern "C" fn forget_object(info: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> c_int {
    // SAFETY: the linker passes a valid structure, whose name is a string and whose headers are that many.
    let (base, name, headers) = unsafe {
        let info = &*info;
        let headers = std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum));
        (info.dlpi_addr as usize, CStr::from_ptr(info.dlpi_name), headers)
    };
    // The kernel's own object is not in any file.
    if name.to_bytes().starts_with(b"linux-vdso") {
        return 0;
    }
    for header in headers.iter().filter(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0) {
        let begin = (base + header.p_vaddr as usize).next_multiple_of(PAGE);
        let end = (base + header.p_vaddr as usize + header.p_memsz as usize) / PAGE * PAGE;
        if begin < end {
            // SAFETY: the range lies within one segment that is mapped from its file, without the right to write, and
            // relocations are only in writable segments: every page comes back with the same content.
            unsafe { libc::madvise(begin as *mut c_void, end - begin, libc::MADV_DONTNEED) };
        }
    }
    0
}

unsafe extern "C" {
    /// Of mimalloc, the binary's allocator.
    fn mi_collect(force: bool);
}

/// Gives back what this thread allocated and others have freed since. A thread that does not allocate any more would
/// keep it for good.
fn collect() {
    // SAFETY: it concerns the calling thread's own heap only.
    unsafe { mi_collect(true) }
}

/// For threads that have nothing to do: collects, at most once a second.
pub fn on_idle() {
    thread_local!(static LAST: Cell<Option<Instant>> = const { Cell::new(None) });
    let now = Instant::now();
    if LAST.get().is_none_or(|last| now.duration_since(last) > BETWEEN_COLLECTIONS) {
        LAST.set(Some(now));
        collect();
    }
}

/// A collection walks the pages of the heap: not before every wait.
const BETWEEN_COLLECTIONS: Duration = Duration::from_secs(1);

/// At least the page size of every machine that this runs on: rounding to more only leaves a little mapped.
const PAGE: usize = 64 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn resident_file_kib() -> u64 {
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("RssFile:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    #[test]
    fn the_start_is_forgotten_and_everything_goes_on() {
        // Maps the whole of the program, as a long start would.
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let exe = std::fs::read_link("/proc/self/exe").unwrap();
        let own = |line: &&str| line.ends_with(&*exe.to_string_lossy()) && !line.contains("rw-p");
        for line in maps.lines().filter(own) {
            let (begin, rest) = line.split_once('-').unwrap();
            let end = rest.split(' ').next().unwrap();
            let parse = |text| usize::from_str_radix(text, 16).unwrap();
            for page in (parse(begin)..parse(end)).step_by(4096) {
                // SAFETY: the address is in a readable mapping of this process.
                std::hint::black_box(unsafe { std::ptr::read_volatile(page as *const u8) });
            }
        }
        let before = resident_file_kib();
        forget_start();
        let after = resident_file_kib();
        // Other tests run on beside this one, and bring back what they need.
        assert!(after < before / 10 * 9, "{before} KiB before, {after} after");
        assert_eq!("still here".to_uppercase(), "STILL HERE");
    }

    #[test]
    fn threads_started_later_have_the_short_slice_and_the_same_niceness() {
        let slice = || {
            let mut attr = SchedAttr { size: size_of::<SchedAttr>() as u32, ..SchedAttr::default() };
            // SAFETY: as in `run_in_short_slices`.
            check(unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, attr.size, 0) }).unwrap();
            (attr.runtime, attr.nice, attr.policy)
        };
        // A thread of its own, so that other tests keep the slice that they have.
        std::thread::spawn(move || {
            let (before, nice, policy) = slice();
            run_in_short_slices().unwrap();
            let after = std::thread::spawn(slice).join().unwrap();
            // Kernels before 6.12 report no slice at all.
            let expected = if before == 0 { 0 } else { SLICE_NANOS };
            assert_eq!(after, (expected, nice, policy));
        })
        .join()
        .unwrap();
    }
}
