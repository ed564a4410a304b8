//! Who is in the host's stack between a packet's arrival and its departure: base chains of nftables, tables of
//! iptables-legacy, IPsec policies.
//!
//! Deliberately absent: which of them matter, which is decided in `kinesin_core::host_routing`, and rules themselves.

use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;

use kinesin_core::host_routing::{Chain, Family, LegacyTable, Seen};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::netlink::{Netlink, attributes, text};

/// `NFT_MSG_GETCHAIN` of the subsystem `NFNL_SUBSYS_NFTABLES`, and the group of its notifications.
const GET_CHAIN: u16 = 10 << 8 | 4;
const GROUP: u32 = 7;
/// Bytes of `struct nfgenmsg`, whose first is the family.
const NFGENMSG: usize = 4;
/// `NFTA_CHAIN_*` and `NFTA_HOOK_HOOKNUM` of linux/netfilter/nf_tables.h.
const TABLE: u16 = 1;
const NAME: u16 = 3;
const HOOK: u16 = 4;
const POLICY: u16 = 5;
const USE: u16 = 6;
const HOOK_NUMBER: u16 = 1;
/// `XFRM_MSG_GETPOLICY`, and bytes of `struct xfrm_userpolicy_id`.
const GET_POLICY: u16 = 0x15;
const POLICY_ID: usize = 64;
/// How often chains are listed anew because they changed meanwhile.
const ATTEMPTS: usize = 8;

/// What asks, and remembers what the kernel does not have: to ask for a module that is not there makes the kernel look for it
/// on disk each time.
#[derive(Debug)]
pub struct StackUsers {
    nftables: Part,
    ipsec: Part,
}

impl Default for StackUsers {
    fn default() -> Self {
        Self { nftables: Part::new("nf_tables"), ipsec: Part::new("xfrm_user") }
    }
}

impl StackUsers {
    /// Looks at the current network namespace, until something is found that needs the stack.
    pub fn look(&mut self) -> Seen {
        let mut seen = Seen::default();
        match self.nftables.ask(|| chains(Chain::matters)) {
            Ok(chains) => seen.chains = chains.unwrap_or_default(),
            Err(error) => seen.unclear.push(format!("nftables cannot be read: {error}")),
        }
        if seen.needs_stack().is_some() {
            return seen;
        }
        for (v6, file) in [(false, "ip_tables_names"), (true, "ip6_tables_names")] {
            match legacy(file) {
                Ok(names) => seen.legacy.extend(names.lines().map(|name| LegacyTable { v6, name: name.to_owned() })),
                Err(error) => seen.unclear.push(format!("{file} cannot be read: {error}")),
            }
        }
        if seen.needs_stack().is_some() {
            return seen;
        }
        match self.ipsec.ask(policies) {
            Ok(policies) => seen.policies = policies.unwrap_or(false),
            Err(error) => seen.unclear.push(format!("IPsec policies cannot be read: {error}")),
        }
        seen
    }
}

/// A part of the kernel that may be built in, a module, or missing.
#[derive(Debug)]
struct Part {
    module: &'static str,
    missing: bool,
}

impl Part {
    fn new(module: &'static str) -> Self {
        Self { module, missing: false }
    }

    /// The answer, or none while the kernel does not have this part. One that was missing is asked for again once its
    /// module is there.
    fn ask<T>(&mut self, question: impl FnOnce() -> io::Result<T>) -> io::Result<Option<T>> {
        if self.missing && !Path::new("/sys/module").join(self.module).exists() {
            return Ok(None);
        }
        let answer = question().map(Some).or_else(|error| match error.raw_os_error() {
            // No such protocol of netlink; no such subsystem of it.
            Some(libc::EPROTONOSUPPORT | libc::EINVAL) => Ok(None),
            _ => Err(error),
        })?;
        self.missing = answer.is_none();
        Ok(answer)
    }
}

/// Base chains of nftables in the current namespace, up to the first that is enough.
///
/// # Errors
/// The kernel does not list them: EPROTONOSUPPORT or EINVAL where it has no nftables.
pub fn chains(enough: impl Fn(&Chain) -> bool) -> io::Result<Vec<Chain>> {
    for _ in 0..ATTEMPTS {
        let socket = Netlink::open(libc::NETLINK_NETFILTER)?;
        // Of all families.
        socket.send(GET_CHAIN, libc::NLM_F_DUMP, &[0; NFGENMSG])?;
        let (mut chains, mut found) = (Vec::new(), false);
        let consistent = socket.answers(|payload| {
            let chain = parse(payload);
            found = chain.as_ref().is_some_and(&enough);
            chains.extend(chain);
            if found { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if consistent || found {
            return Ok(chains);
        }
    }
    Err(io::Error::other("it changes all the time"))
}

/// A base chain; none where it is another.
fn parse(payload: &[u8]) -> Option<Chain> {
    let number = |content: &[u8]| content.first_chunk().map(|bytes| u32::from_be_bytes(*bytes));
    let family = Family::from_number(*payload.first()?);
    let (mut table, mut name, mut hook) = (String::new(), String::new(), None);
    let (mut rules, mut drops) = (0, false);
    for (kind, content) in attributes(payload.get(NFGENMSG..)?) {
        match kind {
            TABLE => table = text(content),
            NAME => name = text(content),
            HOOK => {
                let of_number = attributes(content).find(|(kind, _)| *kind == HOOK_NUMBER);
                hook = of_number.and_then(|(_, content)| number(content));
            }
            // `NF_DROP`
            POLICY => drops = number(content) == Some(0),
            USE => rules = number(content)?,
            _ => {}
        }
    }
    Some(Chain { family, table, name, hook: hook?, rules, drops })
}

/// The names in one of iptables-legacy's files, which are there while the kernel has it.
fn legacy(file: &str) -> io::Result<String> {
    match fs::read_to_string(format!("/proc/thread-self/net/{file}")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        read => read,
    }
}

/// Whether there are IPsec policies in the current namespace.
///
/// # Errors
/// The kernel does not list them: EPROTONOSUPPORT where it has no IPsec.
pub fn policies() -> io::Result<bool> {
    let socket = Netlink::open(libc::NETLINK_XFRM)?;
    socket.send(GET_POLICY, libc::NLM_F_DUMP, &[0; POLICY_ID])?;
    let mut some = false;
    socket.answers(|_| {
        some = true;
        ControlFlow::Break(())
    })?;
    Ok(some)
}

/// Says when rules of nftables change.
#[derive(Debug)]
pub struct RuleChanges {
    socket: AsyncFd<Netlink>,
}

impl RuleChanges {
    /// Listens in the current network namespace. Needs a tokio runtime.
    ///
    /// # Errors
    /// The kernel has no netfilter.
    pub fn open() -> io::Result<Self> {
        let socket = Netlink::open(libc::NETLINK_NETFILTER)?;
        socket.join(GROUP)?;
        // SAFETY: the socket owns its descriptor, always tells the same one, and closes it only when it is dropped.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? };
        Ok(Self { socket })
    }

    /// Waits until something has changed; what has arrived by then is taken for one change.
    ///
    /// # Errors
    /// The socket does not work any more.
    pub async fn next(&mut self) -> io::Result<()> {
        let mut guard = self.socket.readable().await?;
        loop {
            match guard.get_inner().discard() {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    guard.clear_ready();
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
    }
}
