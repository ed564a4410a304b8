//! Programs of somebody else, by bpf(2) and tc(8) alone: nothing of the code under test.
#![allow(dead_code, reason = "every test binary compiles all of this and uses its own part of it")]
#![allow(unreachable_pub, reason = "public to the test binary that includes it, which has no outside")]
#![allow(clippy::unwrap_used, reason = "test code: a panic here is a failed test, with its place")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Commands (`enum bpf_cmd`).
const OBJ_PIN: u32 = 6;
const OBJ_GET: u32 = 7;
const PROG_LOAD: u32 = 5;
const PROG_ATTACH: u32 = 8;
const PROG_DETACH: u32 = 9;
const PROG_QUERY: u32 = 16;
const LINK_CREATE: u32 = 28;
const LINK_DETACH: u32 = 34;

/// Program types (`enum bpf_prog_type`).
pub const SCHED_CLS: u32 = 3;
pub const XDP: u32 = 6;
pub const CGROUP_SOCK_ADDR: u32 = 18;

/// Attach types (`enum bpf_attach_type`).
pub const INET4_CONNECT: u32 = 10;
pub const TCX_INGRESS: u32 = 46;
pub const TCX_EGRESS: u32 = 47;

/// Flags of attaching; 0 to a cgroup means alone.
pub const ALLOW_MULTI: u32 = 2;
pub const BEFORE: u32 = 8;
pub const AFTER: u32 = 16;

/// `TCX_NEXT`, `TC_ACT_UNSPEC`
pub const NEXT: i32 = -1;

fn bpf(command: u32, attr: &[u64]) -> io::Result<i32> {
    // SAFETY: the attribute is readable for its whole size, and what it points to is kept by the callers below.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), size_of_val(attr)) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret as i32) }
}

/// Two words in memory order.
fn words(first: u32, second: u32) -> u64 {
    let bytes: [u8; 8] = [first.to_ne_bytes(), second.to_ne_bytes()].concat().try_into().unwrap();
    u64::from_ne_bytes(bytes)
}

/// One instruction (`struct bpf_insn`), in memory order.
pub const fn insn(code: u8, dst: u8, src: u8, off: i16, imm: u32) -> u64 {
    let [a, b] = off.to_ne_bytes();
    let [i, j, k, l] = imm.to_ne_bytes();
    u64::from_ne_bytes([code, src << 4 | dst, a, b, i, j, k, l])
}

/// A loaded program; what it is attached to keeps it.
pub struct Foreign {
    fd: OwnedFd,
    pub id: u32,
}

impl Foreign {
    /// One that returns a constant.
    pub fn load(kind: u32, attach_type: u32, returns: i32) -> Self {
        // r0 = returns; exit
        let code = [insn(0xb7, 0, 0, 0, returns as u32), insn(0x95, 0, 0, 0, 0)];
        Self::of(kind, attach_type, &code).expect("the kernel takes a constant")
    }

    /// One of these instructions.
    ///
    /// # Errors
    /// The verifier's refusal, without its words.
    pub fn of(kind: u32, attach_type: u32, code: &[u64]) -> io::Result<Self> {
        let license = c"GPL";
        let name = words(u32::from_ne_bytes(*b"fore"), u32::from_ne_bytes(*b"ign\0"));
        let attr = [
            words(kind, code.len() as u32),
            code.as_ptr() as u64,
            license.as_ptr() as u64,
            0,
            0,
            0,
            name,
            0,
            words(0, attach_type),
        ];
        let fd = bpf(PROG_LOAD, &attr)?;
        // SAFETY: the kernel has just returned it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let info = std::fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", fd.as_raw_fd())).unwrap();
        let id = info.lines().find_map(|line| line.strip_prefix("prog_id:")?.trim().parse().ok()).unwrap();
        Ok(Self { fd, id })
    }

    /// `target`: an interface index or a cgroup's file descriptor.
    pub fn attach(&self, target: u32, attach_type: u32, flags: u32) -> io::Result<()> {
        bpf(PROG_ATTACH, &[words(target, self.fd.as_raw_fd() as u32), words(attach_type, flags), 0, 0]).map(drop)
    }

    /// Attaches it by a link, which takes it off when it is closed. `flags`: its order among others.
    pub fn link(&self, ifindex: u32, attach_type: u32, flags: u32) -> io::Result<OwnedFd> {
        let attr = [words(self.fd.as_raw_fd() as u32, ifindex), words(attach_type, flags), 0, 0, 0, 0];
        // SAFETY: the kernel has just returned it.
        bpf(LINK_CREATE, &attr).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
    }

    pub fn detach(&self, target: u32, attach_type: u32) {
        bpf(PROG_DETACH, &[words(target, self.fd.as_raw_fd() as u32), words(attach_type, 0), 0, 0]).unwrap();
    }

    pub fn pin(&self, path: &Path) {
        let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
        bpf(OBJ_PIN, &[path.as_ptr() as u64, words(self.fd.as_raw_fd() as u32, 0)]).unwrap();
    }
}

/// Ids of the programs at a hook, in the order in which they run.
///
/// # Errors
/// EINVAL where the kernel does not know the hook.
pub fn programs(target: u32, attach_type: u32) -> io::Result<Vec<u32>> {
    const MOST: u32 = 64;
    let mut ids = vec![0u32; MOST as usize];
    let attr = [words(target, attach_type), 0, ids.as_mut_ptr() as u64, words(MOST, 0), 0, 0, 0];
    bpf(PROG_QUERY, &attr)?;
    Ok(ids.into_iter().take_while(|id| *id != 0).collect())
}

/// Takes the pinned link off its hook, as `bpftool link detach` does.
pub fn detach_link(pin: &Path) {
    let path = std::ffi::CString::new(pin.as_os_str().as_bytes()).unwrap();
    let fd = bpf(OBJ_GET, &[path.as_ptr() as u64, 0]).expect("it is pinned");
    // SAFETY: the kernel has just returned it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    bpf(LINK_DETACH, &[words(fd.as_raw_fd() as u32, 0)]).unwrap();
}

/// Whether the kernel has tcx (Linux 6.6).
pub fn has_tcx() -> bool {
    // 1 is the loopback device of every namespace.
    programs(1, TCX_INGRESS).is_ok()
}

/// Runs tc(8); returns its lines.
pub fn tc(arguments: &str) -> Vec<String> {
    let output = std::process::Command::new("tc").args(arguments.split_whitespace()).output().expect("iproute2");
    assert!(output.status.success(), "tc {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(|line| line.trim().to_owned()).collect()
}
