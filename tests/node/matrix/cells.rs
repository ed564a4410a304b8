//! The cells: who asks what of whom.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use kinesin::lab::programs::How;
use kinesin::lab::{CLIENT_ADDRESS, HTTP_PORT};

/// The node by which the LAN client comes in, and through whose address NodePorts of another node are asked.
pub(crate) const ENTRY: usize = 1;
/// The node where the other backends are.
pub(crate) const OTHER: usize = 2;
/// A node without backends.
pub(crate) const BARE: usize = 3;

/// Where the client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Position {
    /// A host on the LAN that is no node.
    Lan,
    /// A process of that node.
    Host(usize),
    /// A pod of that node that is no backend.
    Pod(usize),
    /// The backend itself.
    Hairpin,
}

/// What the client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    ClusterIp,
    /// Of the client's own node.
    OwnNodePort,
    /// Of [`ENTRY`].
    EntryNodePort,
    /// `127.0.0.1`
    LoopbackNodePort,
    LoadBalancer,
    ExternalIp,
}

/// A service, by its policies and by where its only backend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Service {
    pub(crate) number: u8,
    pub(crate) name: &'static str,
    /// Both traffic policies are `Local`.
    pub(crate) local: bool,
    /// The backend's node.
    pub(crate) home: usize,
}

pub(crate) const SERVICES: [Service; 4] = [
    Service { number: 1, name: "cluster-at-entry", local: false, home: ENTRY },
    Service { number: 2, name: "cluster-elsewhere", local: false, home: OTHER },
    Service { number: 3, name: "local-at-entry", local: true, home: ENTRY },
    Service { number: 4, name: "local-elsewhere", local: true, home: OTHER },
];

/// The port of ClusterIPs, VIPs and external IPs.
const PORT: u16 = 80;

impl Service {
    pub(crate) fn cluster_ip(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 43, 0, 10 + self.number)
    }

    pub(crate) fn vip(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, 0, 100 + self.number)
    }

    pub(crate) fn external_ip(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 50, 0, 10 + self.number)
    }

    pub(crate) fn node_port(&self) -> u16 {
        30_080 + u16::from(self.number)
    }

    /// The node that announces the VIP: the entry, unless only another one may.
    pub(crate) fn announcer(&self) -> usize {
        if self.local { self.home } else { ENTRY }
    }

    /// The only backend.
    pub(crate) fn backend(&self) -> String {
        format!("pod-{}-1", self.home)
    }

    pub(crate) fn backend_address(&self) -> IpAddr {
        pod(self.home, 1)
    }
}

pub(crate) fn node(number: usize) -> IpAddr {
    Ipv4Addr::new(10, 0, 0, 10 + number as u8).into()
}

pub(crate) fn pod(node: usize, number: usize) -> IpAddr {
    Ipv4Addr::new(10, 42, node as u8, number as u8).into()
}

/// One question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) position: Position,
    pub(crate) target: Target,
    pub(crate) service: Service,
    pub(crate) how: How,
}

impl Cell {
    /// The node of the client, if it is on one.
    pub(crate) fn node(&self) -> Option<usize> {
        match self.position {
            Position::Lan => None,
            Position::Host(node) | Position::Pod(node) => Some(node),
            Position::Hairpin => Some(self.service.home),
        }
    }

    /// The client's own address.
    pub(crate) fn client(&self) -> IpAddr {
        match self.position {
            Position::Lan => CLIENT_ADDRESS.into(),
            Position::Host(number) => node(number),
            Position::Pod(node) => pod(node, 2),
            Position::Hairpin => self.service.backend_address(),
        }
    }

    pub(crate) fn to(&self) -> SocketAddr {
        let node_port = |ip: IpAddr| SocketAddr::new(ip, self.service.node_port());
        match self.target {
            Target::ClusterIp => (self.service.cluster_ip(), PORT).into(),
            Target::LoadBalancer => (self.service.vip(), PORT).into(),
            Target::ExternalIp => (self.service.external_ip(), PORT).into(),
            Target::OwnNodePort => node_port(node(self.node().unwrap_or(ENTRY))),
            Target::EntryNodePort => node_port(node(ENTRY)),
            Target::LoopbackNodePort => node_port(Ipv4Addr::LOCALHOST.into()),
        }
    }

    /// Whether such a question can be asked at all.
    fn is_legal(&self) -> bool {
        match self.target {
            Target::LoopbackNodePort => matches!(self.position, Position::Host(_)),
            // The LAN client has no node, and on the entry node both are one.
            Target::OwnNodePort => self.node().is_some(),
            Target::EntryNodePort => self.node() != Some(ENTRY),
            _ => true,
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let from = match self.position {
            Position::Lan => "LAN client".to_string(),
            Position::Host(node) => format!("host of node-{node}"),
            Position::Pod(node) => format!("pod-{node}-2"),
            Position::Hairpin => format!("{} itself", self.service.backend()),
        };
        write!(f, "{from} to {:?} of {} by {:?} ({})", self.target, self.service.name, self.how, self.to())
    }
}

/// All of them.
pub(crate) fn cells() -> Vec<Cell> {
    let positions = [
        Position::Lan,
        Position::Host(ENTRY),
        Position::Host(OTHER),
        Position::Host(BARE),
        Position::Pod(ENTRY),
        Position::Pod(OTHER),
        Position::Pod(BARE),
        Position::Hairpin,
    ];
    let targets = [
        Target::ClusterIp,
        Target::OwnNodePort,
        Target::EntryNodePort,
        Target::LoopbackNodePort,
        Target::LoadBalancer,
        Target::ExternalIp,
    ];
    let mut all = Vec::new();
    for position in positions {
        for target in targets {
            for service in SERVICES {
                for how in [How::Tcp, How::UdpConnected, How::UdpUnconnected] {
                    let cell = Cell { position, target, service, how };
                    all.extend(cell.is_legal().then_some(cell));
                }
            }
        }
    }
    all
}

/// What the services forward to, by protocol: HTTP, and datagrams that ask who is there.
pub(crate) fn manifests() -> String {
    let mut text = String::new();
    for service in SERVICES {
        let (name, policy) = (service.name, if service.local { "Local" } else { "Cluster" });
        let (cluster_ip, vip, external) = (service.cluster_ip(), service.vip(), service.external_ip());
        let (node_port, home, entry) = (service.node_port(), service.home, service.announcer());
        let (pod, address, echo) = (service.backend(), service.backend_address(), kinesin::lab::ECHO_PORT);
        text.push_str(&format!(
            "\
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default, labels: {{entry: node-{entry}}}}}
spec:
  type: LoadBalancer
  loadBalancerIP: {vip}
  clusterIP: {cluster_ip}
  clusterIPs: [{cluster_ip}]
  ipFamilies: [IPv4]
  externalIPs: [{external}]
  externalTrafficPolicy: {policy}
  internalTrafficPolicy: {policy}
  ports:
    - {{name: http, port: {PORT}, nodePort: {node_port}, targetPort: {HTTP_PORT}}}
    - {{name: who, protocol: UDP, port: {PORT}, nodePort: {node_port}, targetPort: {echo}}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-1, namespace: default, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports:
  - {{name: http, protocol: TCP, port: {HTTP_PORT}}}
  - {{name: who, protocol: UDP, port: {echo}}}
endpoints:
  - addresses: [\"{address}\"]
    nodeName: node-{home}
    conditions: {{ready: true}}
    targetRef: {{kind: Pod, namespace: default, name: {pod}}}
"
        ));
    }
    text.push_str(
        "\
---
apiVersion: cilium.io/v2
kind: CiliumLoadBalancerIPPool
metadata: {name: pool}
spec: {blocks: [{start: 10.0.0.100, stop: 10.0.0.199}]}
",
    );
    for number in [ENTRY, OTHER] {
        text.push_str(&format!(
            "\
---
apiVersion: cilium.io/v2alpha1
kind: CiliumL2AnnouncementPolicy
metadata: {{name: by-node-{number}}}
spec:
  loadBalancerIPs: true
  serviceSelector: {{matchLabels: {{entry: node-{number}}}}}
  nodeSelector: {{matchLabels: {{kubernetes.io/hostname: node-{number}}}}}
"
        ));
    }
    for number in [ENTRY, OTHER, BARE] {
        let address = node(number);
        text.push_str(&format!(
            "\
---
apiVersion: v1
kind: Node
metadata: {{name: node-{number}, labels: {{kubernetes.io/hostname: node-{number}}}}}
status: {{addresses: [{{type: InternalIP, address: \"{address}\"}}]}}
"
        ));
    }
    text
}
