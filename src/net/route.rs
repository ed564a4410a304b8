//! One question to the routing tables: which way to an address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures::TryStreamExt;
use kinesin_core::trace::{Hop, RouteQuery};
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType, RouteVia};

use super::NetError;
use super::rtnl::{Neighbour, Rtnl};

impl Rtnl {
    /// The kernel's way to an address (RTM_GETROUTE); the inner error is its refusal. `neighbours` tells the next hop's MAC.
    ///
    /// A packet that comes in by a device is asked about as such first, so that rules for that device and its source
    /// count; where the kernel refuses it for its source (which `bpf_fib_lookup` never looks at), the destination alone
    /// decides.
    ///
    /// # Errors
    /// When the question itself fails.
    pub async fn way_to(&self, query: &RouteQuery, neighbours: &[Neighbour]) -> Result<Result<Hop, String>, NetError> {
        if query.ingress.is_some()
            && let Ok(found) = self.ask(message(query, true)).await?
        {
            return Ok(hop(&found, query.dst, neighbours));
        }
        Ok(self.ask(message(query, false)).await?.and_then(|found| hop(&found, query.dst, neighbours)))
    }

    async fn ask(&self, message: RouteMessage) -> Result<Result<RouteMessage, String>, NetError> {
        let mut answers = std::pin::pin!(self.handle().route().get(message).execute());
        match answers.try_next().await {
            Ok(Some(found)) => Ok(Ok(found)),
            Ok(None) => Ok(Err("no route".into())),
            Err(rtnetlink::Error::NetlinkError(refused)) => Ok(Err(refused.to_io().to_string())),
            Err(error) => Err(NetError::netlink("ask for a route")(error)),
        }
    }
}

fn message(query: &RouteQuery, as_ingress: bool) -> RouteMessage {
    let (src, ingress) = if as_ingress { (query.src, query.ingress) } else { (None, None) };
    let mut message = match query.dst {
        IpAddr::V4(dst) => RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(dst, 32).build(),
        IpAddr::V6(dst) => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(dst, 128).build(),
    };
    if let Some(src) = src {
        message.header.source_prefix_length = if src.is_ipv4() { 32 } else { 128 };
        message.attributes.push(RouteAttribute::Source(src.into()));
    }
    message.attributes.extend(ingress.map(RouteAttribute::Iif));
    message
}

fn hop(found: &RouteMessage, dst: IpAddr, neighbours: &[Neighbour]) -> Result<Hop, String> {
    let local = match found.header.kind {
        RouteType::Local => true,
        RouteType::Unicast => false,
        other => return Err(format!("{other:?}").to_lowercase()),
    };
    let mut hop = Hop { local, ifindex: 0, via: None, source: None, mac: None, neighbour: "none".into() };
    let address = |address: &RouteAddress| match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    };
    for attribute in &found.attributes {
        match attribute {
            RouteAttribute::Oif(ifindex) => hop.ifindex = *ifindex,
            RouteAttribute::Gateway(via) => hop.via = address(via),
            RouteAttribute::Via(RouteVia::Inet(v4)) => hop.via = Some(IpAddr::V4(*v4)),
            RouteAttribute::Via(RouteVia::Inet6(v6)) => hop.via = Some(IpAddr::V6(*v6)),
            RouteAttribute::PrefSource(source) => hop.source = address(source),
            _ => {}
        }
    }
    let next = hop.via.unwrap_or(dst);
    if let Some(entry) = neighbours.iter().find(|entry| (entry.ifindex, entry.address) == (hop.ifindex, next)) {
        hop.mac = entry.mac;
        hop.neighbour = entry.state.to_string();
    }
    Ok(hop)
}
