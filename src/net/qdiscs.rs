//! Queueing disciplines that hold filters of tc.
//!
//! Deliberately absent: the filters in them, and every other queueing, which links tell of themselves.

use std::collections::BTreeSet;
use std::io;
use std::ops::ControlFlow;

use super::netlink::{Netlink, attributes, text};

/// Bytes of `struct tcmsg`, and where the interface index is in it.
const TCMSG: usize = 20;
const IFINDEX: usize = 4;
/// `TCA_KIND` of linux/rtnetlink.h.
const KIND: u16 = 1;

/// Indices of the current namespace's devices that have `clsact` or `ingress`.
///
/// # Errors
/// The kernel cannot list them.
pub fn with_filters() -> io::Result<BTreeSet<u32>> {
    let socket = Netlink::open(libc::NETLINK_ROUTE)?;
    socket.send(libc::RTM_GETQDISC, libc::NLM_F_DUMP, &[0; TCMSG])?;
    let mut found = BTreeSet::new();
    socket.answers(|payload| {
        found.extend(parse(payload));
        ControlFlow::Continue(())
    })?;
    Ok(found)
}

fn parse(payload: &[u8]) -> Option<u32> {
    let ifindex = u32::from_ne_bytes(*payload.get(IFINDEX..)?.first_chunk()?);
    let (_, kind) = attributes(payload.get(TCMSG..)?).find(|(kind, _)| *kind == KIND)?;
    matches!(text(kind).as_str(), "clsact" | "ingress").then_some(ifindex)
}
