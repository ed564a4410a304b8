//! How a lab comes to be: the LAN, then nodes, then pods, with the routes that a plain CNI would make.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::client::Client;
use super::node::{Node, NodeInner, Pod, PodInner};
use super::territory::{self, Territory};
use super::wire::wire;
use super::{CLIENT_ADDRESS, CLIENT_ADDRESS6, Lab, LabError, MAX_NODES};
use crate::net::rtnl::{Route, Rtnl};
use crate::net::{Netns, sysctl};

/// What every pod sends to: an address that each node-side veth has, with link scope, so that it takes none of the pod
/// network and is never chosen as a source towards others.
const POD_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The same for IPv6.
const POD_GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// Link-local addresses are usable at once: nobody else is there to have them.
const NO_DAD: [(&str, &str); 2] = [("ipv6/conf/all/accept_dad", "0"), ("ipv6/conf/default/accept_dad", "0")];
/// More would take addresses of pods.
const MAX_SEGMENTS: usize = 9;

/// One Ethernet of the lab, by its number from 0, on which the client is. The router is on all of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Segment(pub(super) u8);

impl Segment {
    fn bridge(self) -> String {
        if self.0 == 0 { "lan".into() } else { format!("lan{}", self.0) }
    }

    /// A host's address there.
    fn address(self, last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, self.0, last)
    }

    pub(super) fn address6(self, last: u16) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x10, self.0.into(), 0, 0, 0, 0, last)
    }

    fn router(self) -> Ipv4Addr {
        self.address(1)
    }

    fn router6(self) -> Ipv6Addr {
        self.address6(1)
    }
}

/// A lab that is being described; see [`Lab::builder`].
#[derive(Debug, Clone)]
pub struct LabBuilder {
    name: String,
    nodes: usize,
    pods_per_node: usize,
    binary: Option<PathBuf>,
    dual_stack: bool,
    segments: usize,
    wires: bool,
}

impl LabBuilder {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            nodes: 1,
            pods_per_node: 0,
            binary: None,
            dual_stack: false,
            segments: 1,
            wires: false,
        }
    }

    /// How many nodes; 1 unless said.
    pub fn nodes(mut self, count: usize) -> Self {
        self.nodes = count;
        self
    }

    /// How many pods each node has; none unless said. They serve nothing until [`Pod::serve`].
    pub fn pods_per_node(mut self, count: usize) -> Self {
        self.pods_per_node = count;
        self
    }

    /// Everybody has an IPv6 address too: the client and the nodes in `fd00:10::/64`, pods in `fd00:42:<node>::/64`.
    pub fn dual_stack(mut self) -> Self {
        self.dual_stack = true;
        self
    }

    /// Nodes are on so many segments in turn, with a router between them; 1 unless said. The client is on the first, like
    /// node 1.
    pub fn segments(mut self, count: usize) -> Self {
        self.segments = count;
        self
    }

    /// The LAN's cables carry what real ones carry: frames of one segment each, with their checksums. For XDP, which sees
    /// frames as they are, and must be able to send them back.
    pub fn wires(mut self) -> Self {
        self.wires = true;
        self
    }

    /// The `kinesin` binary to run; this very executable unless said. Tests must say it.
    pub fn binary(mut self, path: impl Into<PathBuf>) -> Self {
        self.binary = Some(path.into());
        self
    }

    /// Makes it. Needs root and a tokio runtime. What was made is removed again when something fails.
    ///
    /// # Errors
    /// When the kernel refuses something; the error names it.
    pub async fn build(self) -> Result<Lab, LabError> {
        if self.nodes > MAX_NODES || self.pods_per_node > 200 {
            return Err(LabError::Invalid(format!(
                "at most {MAX_NODES} nodes and 200 pods per node fit the lab's addresses"
            )));
        }
        if !(1..=MAX_SEGMENTS).contains(&self.segments) {
            return Err(LabError::Invalid(format!("a lab has 1 to {MAX_SEGMENTS} segments")));
        }
        let binary = match self.binary {
            Some(path) => path,
            None => std::env::current_exe().map_err(LabError::io("find this executable"))?,
        };
        let territory = Territory::claim(&self.name)?;
        let segments = self.segments as u8;
        let lan = make_lan(&territory, segments, self.dual_stack).await?;
        let client = make_client(&territory, &lan, &binary, (self.dual_stack, segments > 1)).await?;
        let dual_stack = self.dual_stack;
        let wires = if self.wires { Some(vec![wire(&lan, "client", client.netns())?]) } else { None };
        let mut lab = Lab { client, nodes: Vec::new(), lan, binary, dual_stack, segments, wires, territory };
        for _ in 0..self.nodes {
            lab.add_node_with(self.pods_per_node).await?;
        }
        Ok(lab)
    }
}

impl Lab {
    /// Adds a node without pods to the running lab, and routes between it and the others.
    ///
    /// # Errors
    /// When the kernel refuses something, or the LAN's addresses are used up.
    pub async fn add_node(&mut self) -> Result<Node, LabError> {
        self.add_node_with(0).await
    }

    /// Adds a node with pods to the running lab.
    ///
    /// # Errors
    /// As [`Lab::add_node`].
    pub async fn add_node_with(&mut self, pods: usize) -> Result<Node, LabError> {
        let number = self.nodes.len() + 1;
        if number > MAX_NODES {
            return Err(LabError::Invalid(format!("the lab has no addresses for more than {MAX_NODES} nodes")));
        }
        let node = make_node(self, number).await?;
        if self.segments > 1 {
            route_pods(&self.lan, &node).await?;
        }
        if let Some(wires) = &mut self.wires {
            wires.push(wire(&self.lan, node.name(), node.netns())?);
        }
        for other in &self.nodes {
            connect_pods(&node, other).await?;
            connect_pods(other, &node).await?;
        }
        for _ in 0..pods {
            self.add_pod_to(&node).await?;
        }
        self.nodes.push(node.clone());
        Ok(node)
    }

    /// Adds a pod to a node.
    ///
    /// # Errors
    /// When the kernel refuses something.
    pub async fn add_pod(&mut self, node: usize) -> Result<Pod, LabError> {
        let node = self.node(node).clone();
        self.add_pod_to(&node).await
    }

    async fn add_pod_to(&self, node: &Node) -> Result<Pod, LabError> {
        let number = node.pods().len() + 1;
        let pod = make_pod(&self.territory, node, number, &self.binary).await?;
        node.inner.pods.lock().unwrap_or_else(PoisonError::into_inner).push(pod.clone());
        Ok(pod)
    }
}

async fn make_lan(territory: &Territory, segments: u8, dual_stack: bool) -> Result<Netns, LabError> {
    let netns = territory.netns("lan")?;
    pass_filters_by(&netns)?;
    if segments > 1 {
        sysctl::write_in(&netns, &[("ipv4/ip_forward", "1"), ("ipv4/conf/all/rp_filter", "0")])?;
        sysctl::write_in(&netns, &[("ipv4/conf/default/rp_filter", "0")])?;
    }
    if segments > 1 && dual_stack {
        sysctl::write_in(&netns, &[("ipv6/conf/all/forwarding", "1"), ("ipv6/conf/default/forwarding", "1")])?;
        sysctl::write_in(&netns, &NO_DAD)?;
    }
    let rtnl = Rtnl::open_in(&netns)?;
    set_loopback_up(&rtnl).await?;
    for segment in (0..segments).map(Segment) {
        let bridge = rtnl.add_bridge(&segment.bridge()).await?;
        rtnl.set_up(bridge).await?;
        rtnl.add_address(bridge, lan_address(segment.router())).await?;
        if segments > 1 && dual_stack {
            rtnl.add_address(bridge, lan_address6(segment.router6())).await?;
        }
    }
    Ok(netns)
}

/// A switch filters nothing: where `br_netfilter` is loaded, a bridge would show every frame that it forwards to the rules of IP, and
/// put fragments together. Where it is not, there are no such settings.
fn pass_filters_by(lan: &Netns) -> Result<(), LabError> {
    let settings = ["arp", "ip", "ip6"].map(|family| format!("bridge/bridge-nf-call-{family}tables"));
    let pass = || settings.iter().filter(|key| sysctl::read(key).is_ok()).try_for_each(|key| sysctl::write(key, "0"));
    Ok(lan.run(pass)??)
}

/// Tells the router where the pods of a node are.
async fn route_pods(router: &Netns, node: &Node) -> Result<(), LabError> {
    let rtnl = Rtnl::open_in(router)?;
    let ifindex = rtnl.device(&node.inner.segment.bridge()).await?.ifindex;
    let via = Some(node.address().into());
    rtnl.add_route(Route { to: node.pod_cidr().into(), via, ifindex, source: None }).await?;
    if let (Some(cidr), Some(via)) = (node.pod_cidr6(), node.address6()) {
        rtnl.add_route(Route { to: cidr.into(), via: Some(via.into()), ifindex, source: None }).await?;
    }
    Ok(())
}

async fn make_client(
    territory: &Territory,
    lan: &Netns,
    binary: &Path,
    (dual_stack, routed): (bool, bool),
) -> Result<Client, LabError> {
    let netns = territory.netns("client")?;
    plug_in(lan, Segment(0), "client", &netns, (CLIENT_ADDRESS, dual_stack.then_some(CLIENT_ADDRESS6)), routed).await?;
    let cgroup = territory.make_cgroup("client")?;
    Ok(Client::new(netns, cgroup, binary.to_path_buf(), territory.dir().join("logs")))
}

async fn make_node(lab: &Lab, number: usize) -> Result<Node, LabError> {
    let Lab { territory, lan, binary, dual_stack, segments, .. } = lab;
    let dual_stack = *dual_stack;
    let name = format!("node-{number}");
    let short = u8::try_from(number).map_err(|_| LabError::Invalid(format!("no node can have number {number}")))?;
    let segment = Segment((short - 1) % segments);
    let address = segment.address(10 + short);
    let netns = territory.netns(&name)?;
    // A router, like every node with pods. Strict reverse-path filtering where the distributions that ask for it do:
    // the kernel takes the stricter of `all` and the interface.
    let settings = [("ipv4/ip_forward", "1"), ("ipv4/conf/all/rp_filter", "0"), ("ipv4/conf/default/rp_filter", "1")];
    sysctl::write_in(&netns, &settings)?;
    if dual_stack {
        sysctl::write_in(&netns, &[("ipv6/conf/all/forwarding", "1"), ("ipv6/conf/default/forwarding", "1")])?;
    }
    let address6 = segment.address6(0x10 + u16::from(short));
    plug_in(lan, segment, &name, &netns, (address, dual_stack.then_some(address6)), *segments > 1).await?;
    sysctl::write_in(&netns, &[("ipv4/conf/eth0/rp_filter", "1")])?;
    let dir = territory.dir().join(&name);
    for below in ["config", "state"] {
        let path = dir.join(below);
        std::fs::create_dir_all(&path).map_err(LabError::io(format!("create {}", path.display())))?;
    }
    territory::mount_bpffs(&dir.join("bpf"))?;
    let cgroup = territory.make_cgroup(&name)?;
    let pod_cidr = Ipv4Net::new_assert(Ipv4Addr::new(10, 42, short, 0), 24);
    let lab_dir = territory.dir().to_path_buf();
    let lan = lan.clone();
    let binary = binary.clone();
    let pods = Mutex::new(Vec::new());
    let inner = NodeInner {
        number,
        name,
        address,
        segment,
        pod_cidr,
        netns,
        lan,
        cgroup,
        dir,
        lab_dir,
        binary,
        pods,
        dual_stack,
    };
    Ok(Node { inner: Arc::new(inner) })
}

/// A cable from the bridge to `eth0` of a host, its address, and its way out.
async fn plug_in(
    lan: &Netns,
    segment: Segment,
    port: &str,
    host: &Netns,
    (address, address6): (Ipv4Addr, Option<Ipv6Addr>),
    routed: bool,
) -> Result<(), LabError> {
    if address6.is_some() {
        sysctl::write_in(host, &NO_DAD)?;
    }
    let switch = Rtnl::open_in(lan)?;
    let router6 = address6.map(|_| segment.router6()).filter(|_| routed);
    let bridge = switch.device(&segment.bridge()).await?.ifindex;
    let near = switch.add_veth(port, "eth0", host).await?;
    switch.set_master(near, bridge).await?;
    switch.set_up(near).await?;
    let rtnl = Rtnl::open_in(host)?;
    set_loopback_up(&rtnl).await?;
    let eth0 = rtnl.device("eth0").await?.ifindex;
    rtnl.add_address(eth0, lan_address(address)).await?;
    rtnl.set_up(eth0).await?;
    if let Some(address6) = address6 {
        rtnl.add_address(eth0, lan_address6(address6)).await?;
    }
    // Where there is one: see `make_lan`.
    if let Some(via) = router6 {
        let to = Ipv6Net::default().into();
        rtnl.add_route(Route { to, via: Some(via.into()), ifindex: eth0, source: None }).await?;
    }
    let via = Some(segment.router().into());
    let default = Route { to: Ipv4Net::default().into(), via, ifindex: eth0, source: None };
    Ok(rtnl.add_route(default).await?)
}

/// A pod as a CNI plugin wires it: a veth, an address of its own, and a route on either side.
async fn make_pod(territory: &Territory, node: &Node, number: usize, binary: &Path) -> Result<Pod, LabError> {
    let name = format!("pod-{}-{number}", node.number());
    let last = u8::try_from(number).map_err(|_| LabError::Invalid(format!("no pod can have number {number}")))?;
    let [a, b, c, _] = node.pod_cidr().network().octets();
    let address = Ipv4Addr::new(a, b, c, last);
    let netns = territory.netns(&name)?;
    if node.address6().is_some() {
        sysctl::write_in(&netns, &NO_DAD)?;
    }
    let outside = Rtnl::open_in(node.netns())?;
    let veth = outside.add_veth(&format!("veth-{name}"), "eth0", &netns).await?;
    outside.add_address(veth, host_address(POD_GATEWAY)).await?;
    outside.set_up(veth).await?;

    let inside = Rtnl::open_in(&netns)?;
    set_loopback_up(&inside).await?;
    let eth0 = inside.device("eth0").await?.ifindex;
    inside.add_address(eth0, host_address(address)).await?;
    inside.set_up(eth0).await?;
    let gateway = Ipv4Net::from(POD_GATEWAY).into();
    inside.add_route(Route { to: gateway, via: None, ifindex: eth0, source: None }).await?;
    let default = Route { to: Ipv4Net::default().into(), via: Some(POD_GATEWAY.into()), ifindex: eth0, source: None };
    inside.add_route(default).await?;
    // After both ends are up: a route through a link that is down would be refused.
    let source = Some(node.address().into());
    outside.add_route(Route { to: Ipv4Net::from(address).into(), via: None, ifindex: veth, source }).await?;
    let address6 = node.pod_cidr6().map(|cidr| {
        let [a, b, c, ..] = cidr.network().segments();
        Ipv6Addr::new(a, b, c, 0, 0, 0, 0, u16::from(last))
    });
    if let Some(address6) = address6 {
        outside.add_address(veth, Ipv6Net::new_assert(POD_GATEWAY6, 64).into()).await?;
        inside.add_address(eth0, Ipv6Net::from(address6).into()).await?;
        let default =
            Route { to: Ipv6Net::default().into(), via: Some(POD_GATEWAY6.into()), ifindex: eth0, source: None };
        inside.add_route(default).await?;
        let source = node.address6().map(IpAddr::from);
        outside.add_route(Route { to: Ipv6Net::from(address6).into(), via: None, ifindex: veth, source }).await?;
    }

    let relative = node.cgroup().file_name().map(Path::new).unwrap_or(Path::new("")).join(&name);
    let cgroup = territory.make_cgroup(&relative.to_string_lossy())?;
    let log = node.log(&name);
    let node = node.name().to_string();
    let binary = binary.to_path_buf();
    let server = Mutex::new(None);
    Ok(Pod { inner: Arc::new(PodInner { name, node, address, netns, cgroup, log, binary, server }) })
}

/// Tells `from` where the pods of `to` are; the router knows it on other segments.
async fn connect_pods(from: &Node, to: &Node) -> Result<(), LabError> {
    if from.inner.segment.0 != to.inner.segment.0 {
        return Ok(());
    }
    let rtnl = Rtnl::open_in(from.netns())?;
    let eth0 = rtnl.device("eth0").await?.ifindex;
    let route = Route { to: to.pod_cidr().into(), via: Some(to.address().into()), ifindex: eth0, source: None };
    rtnl.add_route(route).await?;
    if let (Some(cidr), Some(via)) = (to.pod_cidr6(), to.address6()) {
        rtnl.add_route(Route { to: cidr.into(), via: Some(via.into()), ifindex: eth0, source: None }).await?;
    }
    Ok(())
}

async fn set_loopback_up(rtnl: &Rtnl) -> Result<(), LabError> {
    let lo = rtnl.device("lo").await?.ifindex;
    Ok(rtnl.set_up(lo).await?)
}

fn lan_address(address: Ipv4Addr) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(address, 24))
}

fn lan_address6(address: Ipv6Addr) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(address, 64))
}

fn host_address(address: Ipv4Addr) -> IpNet {
    IpNet::V4(Ipv4Net::from(address))
}
