//! rtnetlink: the few questions and orders that the agent and the lab have for links, addresses, routes and neighbours.
//!
//! The socket belongs to the namespace in which it was opened. Link types are only those that the lab makes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;

use futures::TryStreamExt;
use ipnet::IpNet;
use kinesin_core::devices::Device;
use rtnetlink::packet_route::address::{AddressHeaderFlags, AddressScope};
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourState};
use rtnetlink::packet_route::route::{RouteAttribute, RouteScope};
use rtnetlink::{Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use tokio::task::JoinHandle;

use super::links;
use super::{NetError, Netns};

/// A netlink socket and the task that reads it.
#[derive(Debug)]
pub struct Rtnl {
    handle: Handle,
    reader: JoinHandle<()>,
}

/// An entry of the neighbour table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// The interface.
    pub ifindex: u32,
    /// The neighbour's address.
    pub address: IpAddr,
    /// Its MAC, once it is known.
    pub mac: Option<[u8; 6]>,
    /// The kernel's opinion of it.
    pub state: NeighbourState,
}

/// A route to add to the main table.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    /// Where to; `0.0.0.0/0` or `::/0` for the default route.
    pub to: IpNet,
    /// The next hop; `None` when the destination is on the link.
    pub via: Option<IpAddr>,
    /// The outgoing interface.
    pub ifindex: u32,
    /// Source address of packets that this host sends along it.
    pub source: Option<IpAddr>,
}

impl Rtnl {
    /// Opens it in the current network namespace. Needs a tokio runtime.
    ///
    /// # Errors
    /// When the kernel has no socket for us.
    pub fn open() -> Result<Self, NetError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetError::io("open a netlink socket"))?;
        Ok(Self { handle, reader: tokio::spawn(connection) })
    }

    /// Opens it inside a namespace; it may be used from everywhere.
    ///
    /// # Errors
    /// When the namespace can not be entered.
    pub fn open_in(netns: &Netns) -> Result<Self, NetError> {
        netns.run(Self::open)?
    }

    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// All devices, by index, with addresses and what their routes say.
    ///
    /// # Errors
    /// When a dump fails.
    pub async fn devices(&self) -> Result<Vec<Device>, NetError> {
        links::dump(&self.handle).await
    }

    /// The device of that name.
    ///
    /// # Errors
    /// When there is none.
    pub async fn device(&self, name: &str) -> Result<Device, NetError> {
        let devices = self.devices().await?;
        devices.into_iter().find(|d| d.name == name).ok_or_else(|| NetError::NotFound(format!("no interface {name}")))
    }

    /// Makes a bridge without spanning tree and returns its index.
    ///
    /// # Errors
    /// When the name is taken.
    pub async fn add_bridge(&self, name: &str) -> Result<u32, NetError> {
        let add = self.handle.link().add(LinkBridge::new(name).build());
        add.execute().await.map_err(NetError::netlink(format!("make bridge {name}")))?;
        Ok(self.device(name).await?.ifindex)
    }

    /// Makes a veth pair: `name` here, `peer` directly in the other namespace. Both are down.
    ///
    /// # Errors
    /// When one of the names is taken.
    pub async fn add_veth(&self, name: &str, peer: &str, peer_netns: &Netns) -> Result<u32, NetError> {
        let far = LinkMessageBuilder::<LinkUnspec>::new().name(peer).setns_by_fd(peer_netns.as_raw_fd()).build();
        let near = LinkVeth::new(name, peer).set_info_data(InfoData::Veth(InfoVeth::Peer(far))).build();
        let what = || format!("make veth {name} with {peer} in {}", peer_netns.name());
        self.handle.link().add(near).execute().await.map_err(NetError::netlink(what()))?;
        Ok(self.device(name).await?.ifindex)
    }

    /// Removes a link, and its peer if it has one.
    ///
    /// # Errors
    /// When there is no such link.
    pub async fn delete_link(&self, ifindex: u32) -> Result<(), NetError> {
        let what = format!("delete interface {ifindex}");
        self.handle.link().del(ifindex).execute().await.map_err(NetError::netlink(what))
    }

    /// Sets a link up.
    ///
    /// # Errors
    /// When there is no such link.
    pub async fn set_up(&self, ifindex: u32) -> Result<(), NetError> {
        self.set(LinkUnspec::new_with_index(ifindex).up().build(), format!("set interface {ifindex} up")).await
    }

    /// Sets a link down.
    ///
    /// # Errors
    /// When there is no such link.
    pub async fn set_down(&self, ifindex: u32) -> Result<(), NetError> {
        self.set(LinkUnspec::new_with_index(ifindex).down().build(), format!("set interface {ifindex} down")).await
    }

    /// Renames a link.
    ///
    /// # Errors
    /// When the name is taken.
    pub async fn rename(&self, ifindex: u32, name: &str) -> Result<(), NetError> {
        let message = LinkUnspec::new_with_index(ifindex).name(name).build();
        self.set(message, format!("rename interface {ifindex} to {name}")).await
    }

    /// Makes a link a port of a bridge.
    ///
    /// # Errors
    /// When the other is no bridge.
    pub async fn set_master(&self, ifindex: u32, bridge: u32) -> Result<(), NetError> {
        let message = LinkUnspec::new_with_index(ifindex).controller(bridge).build();
        self.set(message, format!("make interface {ifindex} a port of {bridge}")).await
    }

    /// Adds an address; IPv4 link-local ones get link scope, so that they are never chosen as a source for others. IPv6
    /// ones are not probed for duplicates (RFC 4862 section 5.4).
    ///
    /// # Errors
    /// When it is there already.
    pub async fn add_address(&self, ifindex: u32, address: IpNet) -> Result<(), NetError> {
        let mut request = self.handle.address().add(ifindex, address.addr(), address.prefix_len());
        match address.addr() {
            IpAddr::V4(v4) if v4.is_link_local() => request.message_mut().header.scope = AddressScope::Link,
            IpAddr::V4(_) => {}
            // Usable at once, as nobody else has it.
            IpAddr::V6(_) => request.message_mut().header.flags |= AddressHeaderFlags::Nodad,
        }
        request.execute().await.map_err(NetError::netlink(format!("add {address} to interface {ifindex}")))
    }

    /// Adds a route to the main table.
    ///
    /// # Errors
    /// When it is there already, or its next hop is not reachable.
    pub async fn add_route(&self, route: Route) -> Result<(), NetError> {
        let mut message = match route.to {
            IpNet::V4(to) if to.prefix_len() > 0 => {
                RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to.network(), to.prefix_len()).build()
            }
            IpNet::V6(to) if to.prefix_len() > 0 => {
                RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(to.network(), to.prefix_len()).build()
            }
            IpNet::V4(_) => RouteMessageBuilder::<Ipv4Addr>::new().build(),
            IpNet::V6(_) => RouteMessageBuilder::<Ipv6Addr>::new().build(),
        };
        if route.via.is_none() {
            message.header.scope = RouteScope::Link;
        }
        message.attributes.push(RouteAttribute::Oif(route.ifindex));
        message.attributes.extend(route.via.map(|via| RouteAttribute::Gateway(via.into())));
        message.attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(source.into())));
        let what = format!("add a route to {} on interface {}", route.to, route.ifindex);
        self.handle.route().add(message).execute().await.map_err(NetError::netlink(what))
    }

    /// The IPv4 and IPv6 neighbour tables.
    ///
    /// # Errors
    /// When the dump fails.
    pub async fn neighbours(&self) -> Result<Vec<Neighbour>, NetError> {
        let dump = self.handle.neighbours().get().execute().try_collect::<Vec<_>>();
        let messages = dump.await.map_err(NetError::netlink("read the neighbour table"))?;
        let entries = messages.into_iter().filter_map(|message| {
            let mut address = None;
            let mut mac = None;
            for attribute in &message.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => address = Some(IpAddr::V4(*v4)),
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => address = Some(IpAddr::V6(*v6)),
                    NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
                    _ => {}
                }
            }
            let header = message.header;
            Some(Neighbour { ifindex: header.ifindex, address: address?, mac, state: header.state })
        });
        Ok(entries.collect())
    }

    /// Makes the kernel find out whether a neighbour answers, unless it has answered lately (`NTF_USE`). The answer is in the
    /// table later. Not for entries that are permanent: they would no longer be.
    ///
    /// # Errors
    /// When there is no such device.
    pub async fn ask_neighbour(&self, ifindex: u32, address: IpAddr) -> Result<(), NetError> {
        let ask = self.handle.neighbours().add(ifindex, address).state(NeighbourState::None);
        let what = format!("ask for {address} on interface {ifindex}");
        ask.flags(NeighbourFlags::Use).replace().execute().await.map_err(NetError::netlink(what))
    }

    async fn set(&self, message: LinkMessage, what: String) -> Result<(), NetError> {
        self.handle.link().set(message).execute().await.map_err(NetError::netlink(what))
    }
}

impl Drop for Rtnl {
    fn drop(&mut self) {
        self.reader.abort();
    }
}
