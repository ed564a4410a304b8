//! To which nodes packets can be handed on as they are, as seen from one node.
//!
//! A peer is a node whose agent lives and says that it takes such packets. A neighbour (dispatch `l2`) has an address in a
//! network of one of our devices, and answers there under the MAC that it says is its own. One that has none is reached by
//! route, where the dispatch leads there. Everything else is no error: packets for its backends go with this node's
//! address as source. Deliberately absent: asking neighbours and routing tables, and the maps.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use kinesin_abi::{
    Addr, NODE_TAG_MAX, NodeTag, PEER_ACROSS, PEER_BY_ROUTE, PEER_TAKES_NEW, PeerKey, PeerValue, mac_words,
};
use smol_str::SmolStr;

use crate::devices::{Device, mac_text};
use crate::host_routing::HostRouting;
use crate::presence::{Link, Record};
use crate::services::Dispatch;

/// The tag of a node's name; 0 for the empty name. FNV-1a, folded: part of the contract between maps and agents of all
/// versions, like the layout.
pub fn tag(node: &str) -> NodeTag {
    if node.is_empty() {
        return 0;
    }
    let hash = node.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    1 + hash % NODE_TAG_MAX
}

/// What is known of another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The node's name.
    pub node: SmolStr,
    /// Where it is on a segment of ours, if it is.
    pub way: Option<Way>,
    /// All that it says of its links.
    pub links: Vec<Link>,
    /// Whether new connections may be handed on to it.
    pub state: State,
}

/// How a peer is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// Our device on the segment.
    pub ifindex: u32,
    /// It is one end of a pair, see [`Device::leads_across`].
    pub across: bool,
    /// The peer's address in a network that both have.
    pub address: IpAddr,
    /// What the peer says of its link there.
    pub link: Link,
}

/// The way to nodes on other segments.
#[derive(Clone, Debug, Default)]
pub struct Beyond {
    /// How packets go there; as [`Dispatch::L2`] they do not.
    pub dispatch: Dispatch,
    /// What the routing tables refuse to lead to, and why.
    pub refused: BTreeMap<IpAddr, String>,
}

/// The shortest MTU that takes every packet of IPv6 (RFC 8200 section 5) inside another one, bytes.
const WRAPPED_MIN: u32 = 1280 + 40;

/// Whether new connections may be handed on to a peer, and if not, why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// They may.
    Neighbour,
    /// They may, by route and in this way.
    Routed(Dispatch),
    /// It is on no segment of ours, and its agent says nothing of the way in which packets would go there: it is older.
    Untaken(Dispatch),
    /// It is on no segment of ours, and its MTU (bytes) leaves no room for what the shortest packets of IPv6 would be
    /// wrapped in.
    Narrow(u32),
    /// It is on no segment of ours, and the routing tables lead to none of its addresses.
    NoRoute(String),
    /// Its agent says nothing of its links: it is older, or its programs are not attached.
    Mute,
    /// It has no address in a network of a selected device.
    Elsewhere,
    /// It takes shorter packets than we may get (bytes).
    Mtu {
        /// Its MTU.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// Nobody answers for its address.
    Unresolved,
    /// Another MAC answers for its address than it says it has.
    OtherMac([u8; 6]),
    /// Its name has the tag of another node's name, which cannot be told from it.
    TagTaken(SmolStr),
}

impl State {
    /// For metrics: one word.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Neighbour => "neighbour",
            Self::Routed(_) => "routed",
            Self::Untaken(_) => "untaken",
            Self::Narrow(_) => "narrow",
            Self::NoRoute(_) => "no-route",
            Self::Mute => "mute",
            Self::Elsewhere => "elsewhere",
            Self::Mtu { .. } => "mtu",
            Self::Unresolved => "unresolved",
            Self::OtherMac(_) => "other-mac",
            Self::TagTaken(_) => "tag-taken",
        }
    }

    /// Every [`Self::label`], so that metrics fall to zero.
    pub const LABELS: [&'static str; 11] = [
        "neighbour",
        "routed",
        "untaken",
        "narrow",
        "no-route",
        "mute",
        "elsewhere",
        "mtu",
        "unresolved",
        "other-mac",
        "tag-taken",
    ];

    /// For people: how packets get to the backends of the node.
    pub fn text(&self) -> String {
        match self {
            Self::Neighbour => "l2".into(),
            Self::Routed(way) => way.text().into(),
            Self::Untaken(way) => format!("snat: its agent does not take {} (older)", way.text()),
            Self::Narrow(mtu) => {
                format!("snat: its MTU is {mtu}, less than the {WRAPPED_MIN} that wrapped packets need")
            }
            Self::NoRoute(why) => format!("snat: no way there: {why}"),
            Self::Mute => "snat: its agent does not take handed-on packets (older, or programs not attached)".into(),
            Self::Elsewhere => "snat: not on a segment of this node".into(),
            Self::Mtu { theirs, ours } => format!("snat: its MTU is {theirs}, this node's {ours}"),
            Self::Unresolved => "snat: does not answer on the segment".into(),
            Self::OtherMac(mac) => {
                format!("snat: {} answers for its address, which is not its MAC", mac_text(*mac))
            }
            Self::TagTaken(other) => format!("snat: its name has the same tag as {other}; rename one of the two"),
        }
    }
}

/// An entry of the kernel's neighbour table that names a MAC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The device.
    pub ifindex: u32,
    /// The neighbour's address.
    pub address: IpAddr,
    /// The MAC that answered for it.
    pub mac: [u8; 6],
}

/// All other living nodes by name, judged by what they say, and by the answers on the segment.
///
/// `devices` are the selected ones of this node, `neighbours` what its neighbour table holds now.
pub fn judge(
    me: &str,
    devices: &[&Device],
    members: &BTreeMap<SmolStr, Arc<Record>>,
    neighbours: &[Neighbour],
    beyond: &Beyond,
) -> Vec<Peer> {
    let mut tags: BTreeMap<NodeTag, SmolStr> = BTreeMap::from([(tag(me), SmolStr::new(me))]);
    let mut peers = Vec::new();
    for (node, record) in members.iter().filter(|(node, _)| *node != me) {
        let way = way(devices, &record.links);
        let other = tags.get(&tag(node)).cloned();
        tags.entry(tag(node)).or_insert_with(|| node.clone());
        let state = match (&way, other) {
            (_, Some(other)) => State::TagTaken(other),
            (None, None) if record.links.is_empty() => State::Mute,
            (None, None) => route(record, beyond),
            (Some(way), None) => reach(way, devices, neighbours),
        };
        peers.push(Peer { node: node.clone(), way, links: record.links.clone(), state });
    }
    // Of two with one tag neither can be meant.
    let taken: BTreeMap<SmolStr, SmolStr> = peers
        .iter()
        .filter_map(|peer| match &peer.state {
            State::TagTaken(other) => Some((other.clone(), peer.node.clone())),
            _ => None,
        })
        .collect();
    for peer in &mut peers {
        if let Some(other) = taken.get(&peer.node) {
            peer.state = State::TagTaken(other.clone());
        }
    }
    peers
}

/// The first link of the peer that is in a network of ours.
fn way(devices: &[&Device], links: &[Link]) -> Option<Way> {
    let shared = |ours: &IpNet, theirs: &IpNet| {
        ours.contains(&theirs.addr()) && theirs.contains(&ours.addr()) && ours.addr() != theirs.addr()
    };
    devices.iter().filter(|device| device.is_live() && device.mac.is_some()).find_map(|device| {
        links.iter().find_map(|link| {
            let theirs = link.addresses.iter().find(|theirs| device.addresses.iter().any(|ours| shared(ours, theirs)));
            theirs.map(|net| Way {
                ifindex: device.ifindex,
                across: device.leads_across(),
                address: net.addr(),
                link: link.clone(),
            })
        })
    })
}

/// The addresses of a link that wrapped packets go to and come from: the first of either family.
fn ends(link: &Link) -> impl Iterator<Item = IpAddr> {
    let first = |v4: bool| link.addresses.iter().map(IpNet::addr).find(|ip| ip.is_ipv4() == v4);
    [first(true), first(false)].into_iter().flatten()
}

/// The addresses that packets for a node on another segment would go to, for asking the routing tables.
pub fn destinations(links: &[Link]) -> impl Iterator<Item = IpAddr> {
    let first = |v4: bool| links.iter().flat_map(ends).find(move |ip| ip.is_ipv4() == v4);
    [first(true), first(false)].into_iter().flatten()
}

/// A node that is on no segment of ours.
fn route(record: &Record, beyond: &Beyond) -> State {
    let Some(taken_as) = beyond.dispatch.taken_as() else { return State::Elsewhere };
    if !record.takes.iter().any(|taken| taken == taken_as) {
        return State::Untaken(beyond.dispatch);
    }
    if let Some(mtu) = record.links.iter().map(|link| link.mtu).find(|mtu| (1..WRAPPED_MIN).contains(mtu)) {
        return State::Narrow(mtu);
    }
    let refused = |ip: IpAddr| beyond.refused.get(&ip).map(|why| format!("{ip}: {why}"));
    let refusals: Option<Vec<String>> = destinations(&record.links).map(refused).collect();
    match refusals {
        Some(whys) => State::NoRoute(whys.join(", ")),
        None => State::Routed(beyond.dispatch),
    }
}

fn reach(way: &Way, devices: &[&Device], neighbours: &[Neighbour]) -> State {
    let ours = devices.iter().find(|device| device.ifindex == way.ifindex).map_or(0, |device| device.mtu);
    let theirs = way.link.mtu;
    if theirs != 0 && theirs < ours {
        return State::Mtu { theirs, ours };
    }
    let found = neighbours.iter().find(|n| n.ifindex == way.ifindex && n.address == way.address);
    match found {
        None => State::Unresolved,
        Some(found) if found.mac != way.link.mac => State::OtherMac(found.mac),
        Some(_) => State::Neighbour,
    }
}

/// A node at these addresses, one of either family at most.
fn at(node: NodeTag, ips: impl Iterator<Item = IpAddr>) -> PeerValue {
    let mut value = PeerValue { node, ..PeerValue::default() };
    for ip in ips {
        match ip {
            IpAddr::V4(v4) => value.ipv4 = Addr::from(v4).v4_raw(),
            IpAddr::V6(v6) => value.ipv6 = v6.into(),
        }
    }
    value
}

/// What may be done with peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage<'a> {
    /// New connections are handed on to them.
    pub new: bool,
    /// Through which devices frames go straight to the other end, where there is one.
    pub routing: &'a HostRouting,
}

/// What the peers hash should hold. `held` is what it holds; `known` says whether a tag belongs to a node that exists.
/// Peers that have left stay, for the connections that they have, but take no new ones; nodes that are gone go.
pub fn entries(
    peers: &[Peer],
    usage: Usage<'_>,
    held: &[(PeerKey, PeerValue)],
    known: impl Fn(NodeTag) -> bool,
) -> BTreeMap<PeerKey, PeerValue> {
    let mut wanted = BTreeMap::new();
    let mut present = BTreeSet::new();
    for peer in peers {
        if peer.links.is_empty() || matches!(peer.state, State::TagTaken(_)) {
            continue;
        }
        let node = tag(&peer.node);
        present.insert(node);
        let takes_new = usage.new && matches!(peer.state, State::Neighbour | State::Routed(_));
        let takes_new = if takes_new { PEER_TAKES_NEW } else { 0 };
        let value = match &peer.way {
            Some(Way { ifindex, across, link, .. }) => {
                let flags = takes_new | if *across && usage.routing.goes_straight(*ifindex) { PEER_ACROSS } else { 0 };
                PeerValue { mac: mac_words(link.mac), flags, ifindex: *ifindex, ..at(node, ends(link)) }
            }
            None => PeerValue { flags: takes_new | PEER_BY_ROUTE, ..at(node, destinations(&peer.links)) },
        };
        wanted.insert(PeerKey::of_node(node), value);
        if let Some(way) = &peer.way {
            wanted.insert(PeerKey::of_mac(way.link.mac), value);
        }
        for link in &peer.links {
            let value = PeerValue { flags: PEER_BY_ROUTE, ..at(node, ends(link)) };
            wanted.extend(ends(link).map(|ip| (PeerKey::of_addr(&ip.into()), value)));
        }
    }
    for (key, value) in held {
        if !present.contains(&value.node) && known(value.node) {
            let straight = usage.routing.goes_straight(value.ifindex);
            let lost = PEER_TAKES_NEW | if straight { 0 } else { PEER_ACROSS };
            wanted.entry(*key).or_insert(PeerValue { flags: value.flags & !lost, ..*value });
        }
    }
    wanted
}
