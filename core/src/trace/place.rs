//! Where a packet comes from: what was written, else what the routing tables say of its source.

use std::net::IpAddr;

use super::question::{HookChoice, Source, Written};
use super::{Packet, Place, RouteQuery, View};

/// The source port of a question that names none: an ephemeral one that is not in the range for translation.
const ASSUMED_PORT: u16 = 40_000;

/// A question that makes no sense on this node: the argument, and what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Misplaced(pub String);

/// The packet of a question, and where it comes from.
///
/// An address of this node is a process here. One whose route leaves by a device that the agent serves comes in by that
/// device; one whose route leaves by another is a pod.
///
/// # Errors
/// The outer ones are the view's.
pub fn place<V: View>(view: &V, written: &Written) -> Result<Result<(Packet, Place), Misplaced>, V::Error> {
    let wrong = |text: String| Ok(Err(Misplaced(text)));
    let packet = |src: Option<IpAddr>| Packet {
        src,
        sport: written.sport.unwrap_or(ASSUMED_PORT),
        dst: written.dst,
        dport: written.dport,
        proto: written.proto,
    };
    let src = match written.source {
        Source::Address(src) => src,
        Source::Host | Source::Pod if written.hook == Some(HookChoice::Packet) => {
            return wrong("--hook packet: a packet has a source address; write that instead of host or pod".into());
        }
        Source::Host => {
            let src = view.route(&RouteQuery { dst: written.dst, src: None, ingress: None })?;
            let src = src.ok().and_then(|hop| hop.source);
            return Ok(Ok((packet(src), Place::Socket { netns: view.host_netns(), host: true })));
        }
        Source::Pod => return Ok(Ok((packet(None), Place::Socket { netns: None, host: false }))),
    };
    if let Some(name) = &written.device {
        if written.hook == Some(HookChoice::Socket) {
            return wrong(format!("--hook socket: what comes in by {name} is no socket of this node; leave one out"));
        }
        let Some(ifindex) = view.device_index(name) else {
            return wrong(format!("--device {name:?}: this node has no such device; see `ip link`"));
        };
        return Ok(Ok((packet(Some(src)), Place::Device(ifindex))));
    }
    let hop = match view.route(&RouteQuery { dst: src, src: None, ingress: None })? {
        Ok(hop) => hop,
        Err(why) => {
            return wrong(format!("src {src}: no route leads there ({why}); say by which device it comes: --device"));
        }
    };
    let from_outside = !hop.local && view.serves(hop.ifindex);
    let host = hop.local || src.is_loopback();
    Ok(match (from_outside, written.hook) {
        (true, Some(HookChoice::Socket)) => Err(Misplaced(format!(
            "--hook socket: {src} is not on this node, its route leaves by {}; write host or pod as src",
            view.device_name(hop.ifindex)
        ))),
        (true, _) => Ok((packet(Some(src)), Place::Device(hop.ifindex))),
        (false, Some(HookChoice::Packet)) => Ok((packet(Some(src)), Place::Node)),
        (false, _) => {
            let netns = if host { view.host_netns() } else { None };
            Ok((packet(Some(src)), Place::Socket { netns, host }))
        }
    })
}
