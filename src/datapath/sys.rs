//! The few bpf(2) commands that aya does not offer: batches, raw elements, links by file descriptor.
//!
//! Everything here is mechanism on file descriptors; meaning is in `batch`, `kernel`, `pin` and `attach`.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Commands of bpf(2) (`enum bpf_cmd` of the kernel's UAPI).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Command {
    MapCreate = 0,
    Lookup = 1,
    Update = 2,
    Delete = 3,
    NextKey = 4,
    ObjPin = 6,
    ObjGet = 7,
    MapFdById = 14,
    InfoByFd = 15,
    ProgQuery = 16,
    BtfLoad = 18,
    LookupBatch = 24,
    UpdateBatch = 26,
    DeleteBatch = 27,
    LinkCreate = 28,
    LinkUpdate = 29,
    LinkDetach = 34,
}

/// Structures whose bytes the kernel may read and write.
///
/// # Safety
/// `repr(C)`, integers only, no padding.
unsafe trait Attr {}

fn call<A: Attr>(command: Command, attr: &mut A) -> io::Result<RawFd> {
    // SAFETY: `attr` is a valid, exclusively borrowed structure of the given size, and pointers in it were made from
    // buffers that the callers below keep alive and large enough.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, command as u32, &raw mut *attr, size_of::<A>()) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret as RawFd) }
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just returned it for us to own.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}
// SAFETY: integers with explicit padding.
unsafe impl Attr for ElementAttr {}

#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    fd: u32,
    elem_flags: u64,
    flags: u64,
}
// SAFETY: integers without padding.
unsafe impl Attr for BatchAttr {}

#[repr(C)]
#[derive(Default)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}
// SAFETY: integers without padding.
unsafe impl Attr for ObjectAttr {}

#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}
// SAFETY: integers without padding.
unsafe impl Attr for InfoAttr {}

#[repr(C)]
#[derive(Default)]
struct IdAttr {
    id: u32,
    next: u32,
    flags: u32,
}
// SAFETY: integers without padding.
unsafe impl Attr for IdAttr {}

#[repr(C)]
#[derive(Default)]
struct LinkAttr {
    first: u32,
    second: u32,
    third: u32,
    fourth: u32,
}
// SAFETY: integers without padding.
unsafe impl Attr for LinkAttr {}

#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    target: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    pad: u32,
}
// SAFETY: integers with explicit padding.
unsafe impl Attr for QueryAttr {}

#[repr(C)]
#[derive(Default)]
struct CreateAttr {
    kind: u32,
    key: u32,
    value: u32,
    entries: u32,
    flags: u32,
    inner: u32,
    numa: u32,
    name: [u8; 16],
    ifindex: u32,
    btf: u32,
    key_type: u32,
    value_type: u32,
}
// SAFETY: integers without padding.
unsafe impl Attr for CreateAttr {}

/// `struct bpf_map_info`, as far as it is used.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(crate) struct MapInfo {
    pub(crate) kind: u32,
    pub(crate) id: u32,
    pub(crate) key: u32,
    pub(crate) value: u32,
    pub(crate) entries: u32,
    pub(crate) flags: u32,
}

/// `struct bpf_link_info`, as far as it is used: the two words after the common part mean (ifindex, attach type) for
/// tcx links, the halves of the cgroup's id for cgroup links, and the ifindex (only) for XDP links.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(crate) struct LinkInfo {
    pub(crate) kind: u32,
    pub(crate) id: u32,
    pub(crate) program: u32,
    pad: u32,
    pub(crate) target: [u32; 2],
}

/// `BPF_LINK_TYPE_CGROUP`
pub(crate) const LINK_CGROUP: u32 = 3;
/// `BPF_LINK_TYPE_XDP`
pub(crate) const LINK_XDP: u32 = 6;
/// `BPF_LINK_TYPE_TCX`
pub(crate) const LINK_TCX: u32 = 11;
/// `BPF_MAP_TYPE_ARRAY`
pub(crate) const MAP_ARRAY: u32 = 2;

fn info<T: Default>(fd: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let mut attr = InfoAttr { fd: fd.as_raw_fd() as u32, len: size_of::<T>() as u32, info: (&raw mut info) as u64 };
    call(Command::InfoByFd, &mut attr)?;
    Ok(info)
}

/// Fails for what is no map; the kernel would answer for a program or link too, in other words.
pub(crate) fn map_info(fd: BorrowedFd<'_>) -> io::Result<MapInfo> {
    check_kind(fd, "map")?;
    info(fd)
}

/// Fails for what is no link.
pub(crate) fn link_info(fd: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    check_kind(fd, "link")?;
    info(fd)
}

fn check_kind(fd: BorrowedFd<'_>, kind: &str) -> io::Result<()> {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    let is = name.to_string_lossy().contains(kind);
    if is { Ok(()) } else { Err(io::Error::new(io::ErrorKind::InvalidInput, format!("not a bpf {kind}"))) }
}

#[repr(C)]
#[derive(Default)]
struct BtfAttr {
    btf: u64,
    log: u64,
    size: u32,
    log_size: u32,
    log_level: u32,
    pad: u32,
}
// SAFETY: integers with explicit padding.
unsafe impl Attr for BtfAttr {}

/// Descriptions of types (BTF), for maps.
pub(crate) fn load_types(btf: &[u8]) -> io::Result<OwnedFd> {
    let mut attr = BtfAttr { btf: btf.as_ptr() as u64, size: btf.len() as u32, ..Default::default() };
    call(Command::BtfLoad, &mut attr).map(owned)
}

/// An array of one element, as inner maps are; `types` has those of its key and value, by number.
pub(crate) fn create_array(name: &str, value: u32, types: Option<(BorrowedFd<'_>, [u32; 2])>) -> io::Result<OwnedFd> {
    let mut attr = CreateAttr { kind: MAP_ARRAY, key: 4, value, entries: 1, ..Default::default() };
    for (to, from) in attr.name[..15].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    if let Some((btf, [key, value])) = types {
        (attr.btf, attr.key_type, attr.value_type) = (btf.as_raw_fd() as u32, key, value);
    }
    call(Command::MapCreate, &mut attr).map(owned)
}

pub(crate) fn map_by_id(id: u32) -> io::Result<OwnedFd> {
    call(Command::MapFdById, &mut IdAttr { id, ..Default::default() }).map(owned)
}

/// Ids of the programs at a hook of a device or cgroup; as many as there is room for.
pub(crate) fn programs_at(target: u32, attach_type: u32) -> io::Result<Vec<u32>> {
    let mut ids = [0u32; 64];
    let mut attr = QueryAttr {
        target,
        attach_type,
        programs: ids.as_mut_ptr() as u64,
        count: ids.len() as u32,
        ..Default::default()
    };
    match call(Command::ProgQuery, &mut attr) {
        Err(error) if error.raw_os_error() != Some(libc::ENOSPC) => Err(error),
        _ => Ok(ids.into_iter().take(attr.count as usize).collect()),
    }
}

/// Reads an element into `value`, which must have room for what the kernel copies.
pub(crate) fn lookup(fd: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr = ElementAttr {
        fd: fd.as_raw_fd() as u32,
        key: key.as_ptr() as u64,
        value: value.as_mut_ptr() as u64,
        ..Default::default()
    };
    present(call(Command::Lookup, &mut attr))
}

/// Adds or replaces an element.
pub(crate) fn update(fd: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    write(fd, key, value, 0)
}

/// Adds an element; EEXIST where there is one.
pub(crate) fn insert(fd: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    /// `BPF_NOEXIST`
    const NEW: u64 = 1;
    write(fd, key, value, NEW)
}

fn write(fd: BorrowedFd<'_>, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
    let mut attr = ElementAttr {
        fd: fd.as_raw_fd() as u32,
        pad: 0,
        key: key.as_ptr() as u64,
        value: value.as_ptr() as u64,
        flags,
    };
    call(Command::Update, &mut attr).map(drop)
}

/// Whether there was such an element.
pub(crate) fn delete(fd: BorrowedFd<'_>, key: &[u8]) -> io::Result<bool> {
    let mut attr = ElementAttr { fd: fd.as_raw_fd() as u32, key: key.as_ptr() as u64, ..Default::default() };
    present(call(Command::Delete, &mut attr))
}

/// The key after `key`, or the first one.
pub(crate) fn next_key(fd: BorrowedFd<'_>, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<bool> {
    let mut attr = ElementAttr {
        fd: fd.as_raw_fd() as u32,
        key: key.map_or(0, |key| key.as_ptr() as u64),
        value: next.as_mut_ptr() as u64,
        ..Default::default()
    };
    present(call(Command::NextKey, &mut attr))
}

fn present(result: io::Result<RawFd>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// A batch; returns how many elements were done, and the error that stopped it.
///
/// The buffers must have room for `count` elements of the map's own sizes.
pub(crate) fn batch(
    command: Command,
    fd: BorrowedFd<'_>,
    (from, to): (Option<&[u8]>, Option<&mut [u8]>),
    keys: *const u8,
    values: *const u8,
    count: u32,
) -> (u32, io::Result<()>) {
    let mut attr = BatchAttr {
        in_batch: from.map_or(0, |from| from.as_ptr() as u64),
        out_batch: to.map_or(0, |to| to.as_mut_ptr() as u64),
        keys: keys as u64,
        values: values as u64,
        count,
        fd: fd.as_raw_fd() as u32,
        ..Default::default()
    };
    let result = call(command, &mut attr).map(drop);
    (attr.count.min(count), result)
}

pub(crate) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr { path: path.as_ptr() as u64, fd: fd.as_raw_fd() as u32, flags: 0 };
    call(Command::ObjPin, &mut attr).map(drop)
}

/// Opens what is pinned at the path; none where nothing is.
pub(crate) fn open_pin(path: &Path) -> io::Result<Option<OwnedFd>> {
    let path = c_path(path)?;
    let mut attr = ObjectAttr { path: path.as_ptr() as u64, ..Default::default() };
    match call(Command::ObjGet, &mut attr) {
        Ok(fd) => Ok(Some(owned(fd))),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `target` is an interface index or a cgroup's file descriptor; what `flags` mean depends on the type.
pub(crate) fn create_link(program: BorrowedFd<'_>, target: u32, attach_type: u32, flags: u32) -> io::Result<OwnedFd> {
    let mut attr = LinkAttr { first: program.as_raw_fd() as u32, second: target, third: attach_type, fourth: flags };
    call(Command::LinkCreate, &mut attr).map(owned)
}

/// Replaces the program of a link; packets meet either the old or the new one.
pub(crate) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkAttr { first: link.as_raw_fd() as u32, second: program.as_raw_fd() as u32, third: 0, fourth: 0 };
    call(Command::LinkUpdate, &mut attr).map(drop)
}

/// Takes a link's program off its hook at once; removing the pin alone leaves that to a later moment of the kernel's.
pub(crate) fn detach_link(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = IdAttr { id: link.as_raw_fd() as u32, ..Default::default() };
    call(Command::LinkDetach, &mut attr).map(drop)
}

/// The kernel's name for the network namespace of the calling thread, unique until the next boot.
///
/// # Errors
/// Before Linux 5.14, which does not tell (`SO_NETNS_COOKIE`).
pub(super) fn own_netns_cookie() -> io::Result<u64> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let (mut cookie, mut length) = (0u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: the kernel writes at most `length` bytes to `cookie`, which has as many.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if done == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}
