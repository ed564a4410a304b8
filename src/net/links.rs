//! What network devices this namespace has, kept current. Which of them matter is decided in `kinesin_core::devices`.
//!
//! Notifications only say that something changed; what is published is always read anew, because the kernel removes
//! some things without a word (IPv4 routes of a link that goes down) and drops notifications when a reader is slow.
//! So what is published are levels: equal snapshots are not repeated and intermediate states may be left out.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use futures::channel::mpsc::UnboundedReceiver;
use futures::{FutureExt, StreamExt, TryStreamExt};
use ipnet::IpNet;
use kinesin_core::devices::Device;
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};
use rtnetlink::sys::{AsyncSocket, SocketAddr};
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::NetError;

/// All devices of the namespace at one time, sorted by index.
pub type Snapshot = Arc<Vec<Device>>;

/// The task that follows the kernel; it stops when this is dropped.
#[derive(Debug)]
pub struct LinkMonitor {
    snapshots: watch::Receiver<Option<Snapshot>>,
    tasks: [JoinHandle<()>; 3],
}

/// Room for notifications while we read tables: bursts (a thousand routes at once) should not overrun, and when they
/// do nothing is lost but the time of one more look.
const RECEIVE_BUFFER: libc::c_int = 4 << 20;
/// After a look the next one comes this much later at the earliest, so that a storm of changes costs a bounded share.
const PAUSE: Duration = Duration::from_millis(20);
/// How long a look may take before it is given up and repeated.
const DUMP_LIMIT: Duration = Duration::from_secs(5);
/// Pause after a failed look.
const RETRY: Duration = Duration::from_millis(200);

impl LinkMonitor {
    /// Starts following the current network namespace and returns when the first look is complete.
    ///
    /// # Errors
    /// When the kernel has no sockets for us.
    pub async fn open() -> Result<Self, NetError> {
        // Before the first await: afterwards another thread, perhaps of another namespace, may go on.
        let mut monitor = Self::open_here()?;
        let complete = monitor.snapshots.wait_for(Option::is_some).await.is_ok();
        if complete {
            // next() shall return what was found.
            monitor.snapshots.mark_changed();
            return Ok(monitor);
        }
        Err(NetError::NotFound("the netlink connection ended before the first look".into()))
    }

    /// Starts following the namespace of this very thread, which may only be visiting it. Needs a tokio runtime.
    ///
    /// # Errors
    /// When the kernel has no sockets for us.
    pub fn open_here() -> Result<Self, NetError> {
        // Two sockets, so that a burst of notifications can not disturb the reply to a dump.
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let opened = rtnetlink::new_multicast_connection(&groups);
        let (mut listening, _, changes) = opened.map_err(NetError::io("listen to netlink notifications"))?;
        grow_buffer(listening.socket_mut().socket_mut().as_raw_fd());
        let (mut asking, handle, _) = rtnetlink::new_connection().map_err(NetError::io("open a netlink socket"))?;
        // With strict checking the kernel filters route dumps by table (since 4.20).
        let _ = asking.socket_mut().socket_mut().set_netlink_get_strict_chk(true);
        let (publish, snapshots) = watch::channel(None);
        let tasks = [tokio::spawn(listening), tokio::spawn(asking), tokio::spawn(follow(handle, changes, publish))];
        Ok(Self { snapshots, tasks })
    }

    /// The devices after the next change; the first call returns what is there. Changes in between are left out.
    /// `None` when the kernel connection ended: open a new monitor.
    pub async fn next(&mut self) -> Option<Snapshot> {
        loop {
            self.snapshots.changed().await.ok()?;
            if let Some(snapshot) = self.snapshots.borrow_and_update().clone() {
                return Some(snapshot);
            }
        }
    }

    /// The level itself, for those who only look now and then; `None` in it until the first look is complete.
    pub fn watch(&self) -> watch::Receiver<Option<Snapshot>> {
        self.snapshots.clone()
    }
}

impl Drop for LinkMonitor {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

type Changes = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// Looks, publishes, waits for a change (or an overrun, which arrives as a message too), and again.
async fn follow(handle: Handle, mut changes: Changes, publish: watch::Sender<Option<Snapshot>>) {
    loop {
        match tokio::time::timeout(DUMP_LIMIT, dump(&handle)).await {
            Ok(Ok(devices)) => {
                publish.send_if_modified(|current| {
                    if current.as_ref().is_some_and(|old| **old == devices) {
                        return false;
                    }
                    *current = Some(Arc::new(devices));
                    true
                });
            }
            Ok(Err(error)) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "network devices could not be read, trying again"
                );
                tokio::time::sleep(RETRY).await;
                continue;
            }
            Err(_) => {
                tracing::warn!("the kernel did not finish listing network devices, trying again");
                continue;
            }
        }
        tokio::time::sleep(PAUSE).await;
        if changes.next().await.is_none() {
            return;
        }
        // Everything that has arrived by now is covered by the next look.
        while let Some(Some(_)) = changes.next().now_or_never() {}
    }
}

/// Reads links, addresses and the main routing tables.
pub(super) async fn dump(handle: &Handle) -> Result<Vec<Device>, NetError> {
    let mut devices = BTreeMap::new();
    let links = handle.link().get().execute().try_collect::<Vec<_>>();
    for message in links.await.map_err(NetError::netlink("list links"))? {
        let device = device(&message);
        devices.insert(device.ifindex, device);
    }
    let addresses = handle.address().get().execute().try_collect::<Vec<_>>();
    for message in addresses.await.map_err(NetError::netlink("list addresses"))? {
        // IFA_ADDRESS is the peer's address on point-to-point links; ours is IFA_LOCAL where that exists.
        let mut found: Option<IpAddr> = None;
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(address) => found = Some(*address),
                AddressAttribute::Address(address) => found = found.or(Some(*address)),
                _ => {}
            }
        }
        if let Some(device) = devices.get_mut(&message.header.index)
            && let Some(net) = found.and_then(|address| IpNet::new(address, message.header.prefix_len).ok())
        {
            device.addresses.push(net);
        }
    }
    for request in [
        RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    ] {
        let mut request = request;
        // Under strict checking these are filters, and zero is "any".
        request.header.protocol = 0.into();
        request.header.kind = RouteType::Unspec;
        let routes = handle.route().get(request).execute().try_collect::<Vec<_>>();
        for route in routes.await.map_err(NetError::netlink("list routes"))? {
            note_route(&mut devices, &route);
        }
    }
    for device in devices.values_mut() {
        device.addresses.sort();
    }
    Ok(devices.into_values().collect())
}

fn device(message: &LinkMessage) -> Device {
    let flags = message.header.flags;
    let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    let mut device = Device {
        ifindex: message.header.index,
        up: flags.contains(LinkFlags::Up),
        running: flags.contains(LinkFlags::Running) && flags.contains(LinkFlags::LowerUp),
        is_loopback: flags.contains(LinkFlags::Loopback),
        is_slave: flags.contains(LinkFlags::Port),
        ..Device::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name = name.into(),
            LinkAttribute::Address(bytes) if ethernet => device.mac = bytes.as_slice().try_into().ok(),
            LinkAttribute::Controller(master) => device.master = Some(*master),
            LinkAttribute::Mtu(mtu) => device.mtu = *mtu,
            LinkAttribute::LinkNetNsId(_) => device.reaches_out = true,
            LinkAttribute::Qdisc(qdisc) => device.qdisc = qdisc.into(),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        device.kind = kind.to_string().into();
                    }
                }
            }
            _ => {}
        }
    }
    device
}

/// Marks the devices that a route leaves through.
fn note_route(devices: &mut BTreeMap<u32, Device>, route: &RouteMessage) {
    if route.header.kind != RouteType::Unicast {
        return;
    }
    let mut table = u32::from(route.header.table);
    let mut destination = None;
    let mut out = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Destination(RouteAddress::Inet(v4)) => destination = Some(IpAddr::V4(*v4)),
            RouteAttribute::Destination(RouteAddress::Inet6(v6)) => destination = Some(IpAddr::V6(*v6)),
            RouteAttribute::Oif(ifindex) => out.push(*ifindex),
            RouteAttribute::MultiPath(hops) => out.extend(hops.iter().map(|hop| hop.interface_index)),
            _ => {}
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return;
    }
    let default = route.header.destination_prefix_length == 0;
    let global = default || destination.is_some_and(is_global);
    for ifindex in out {
        if let Some(device) = devices.get_mut(&ifindex) {
            device.has_default_route |= default;
            device.has_global_unicast_route |= global;
        }
    }
}

/// Neither loopback, link-local nor multicast; private ranges count, because pods and LANs live there.
fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !(v4.is_loopback() || v4.is_link_local() || v4.is_multicast() || v4.is_unspecified()),
        IpAddr::V6(v6) => !(v6.is_loopback() || v6.is_unicast_link_local() || v6.is_multicast() || v6.is_unspecified()),
    }
}

/// Best effort: beyond the sysctl limit with `CAP_NET_ADMIN`, up to it without.
fn grow_buffer(socket: std::os::fd::RawFd) {
    let bytes = RECEIVE_BUFFER;
    for option in [libc::SO_RCVBUFFORCE, libc::SO_RCVBUF] {
        // SAFETY: the pointer and length describe a c_int that outlives the call.
        let result = unsafe {
            libc::setsockopt(
                socket,
                libc::SOL_SOCKET,
                option,
                (&raw const bytes).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if result == 0 {
            return;
        }
    }
}
