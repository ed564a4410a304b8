//! The cells: who asks what of whom.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use kinesin::lab::programs::How;
use kinesin::lab::{CLIENT_ADDRESS, CLIENT_ADDRESS6, ECHO_PORT, HTTP_PORT, ROUTER_ADDRESS};

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
    /// Of the backend, on its node.
    HostPort,
    /// The same by loopback.
    LoopbackHostPort,
}

/// A service, by its policies and by where its only backend is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Service {
    pub(crate) number: u8,
    pub(crate) name: &'static str,
    /// `externalTrafficPolicy: Local`
    pub(crate) local_outside: bool,
    /// `internalTrafficPolicy: Local`
    pub(crate) local_inside: bool,
    /// The backend's node.
    pub(crate) home: usize,
    pub(crate) plan: Plan,
}

/// The services.
pub(crate) fn services(plan: Plan) -> [Service; 6] {
    let of = |number, name, [local_outside, local_inside]: [bool; 2], home| Service {
        number,
        name,
        local_outside,
        local_inside,
        home,
        plan,
    };
    [
        of(1, "cluster-at-entry", [false, false], ENTRY),
        of(2, "cluster-elsewhere", [false, false], OTHER),
        of(3, "local-at-entry", [true, true], ENTRY),
        of(4, "local-elsewhere", [true, true], OTHER),
        of(5, "local-outside-elsewhere", [true, false], OTHER),
        of(6, "local-inside-elsewhere", [false, true], OTHER),
    ]
}

/// Which addresses clients use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// Who has which address: by family, and by how many segments the nodes are on in turn, with a router between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) family: Family,
    pub(crate) segments: usize,
}

impl Plan {
    pub(crate) fn segment(self, node: usize) -> usize {
        (node - 1) % self.segments
    }

    pub(crate) fn node(self, number: usize) -> IpAddr {
        let (segment, last) = (self.segment(number), number);
        match self.family {
            Family::V4 => Ipv4Addr::new(10, 0, segment as u8, 10 + last as u8).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, 0x10, segment as u16, 0, 0, 0, 0, 0x10 + last as u16).into(),
        }
    }

    /// The router, on the client's segment.
    pub(crate) fn router(self) -> IpAddr {
        match self.family {
            Family::V4 => ROUTER_ADDRESS.into(),
            Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 1).into(),
        }
    }

    fn pod(self, node: usize, number: usize) -> IpAddr {
        match self.family {
            Family::V4 => Ipv4Addr::new(10, 42, node as u8, number as u8).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, 0x42, node as u16, 0, 0, 0, 0, number as u16).into(),
        }
    }

    /// `10.<network>.0.<last>`, or `fd00:<network>::<last>`.
    fn at(self, network: u8, last: u8) -> IpAddr {
        match self.family {
            Family::V4 => Ipv4Addr::new(10, network, 0, last).into(),
            Family::V6 => {
                let digits = |n: u8| u16::from_str_radix(&n.to_string(), 16).unwrap();
                Ipv6Addr::new(0xfd00, digits(network), 0, 0, 0, 0, 0, digits(last)).into()
            }
        }
    }

    fn client(self) -> IpAddr {
        match self.family {
            Family::V4 => CLIENT_ADDRESS.into(),
            Family::V6 => CLIENT_ADDRESS6.into(),
        }
    }

    fn loopback(self) -> IpAddr {
        match self.family {
            Family::V4 => Ipv4Addr::LOCALHOST.into(),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        }
    }

    /// As Kubernetes calls it.
    const fn name(self) -> &'static str {
        match self.family {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        }
    }

    /// The networks of ClusterIPs and external IPs.
    pub(crate) fn routed(self) -> [&'static str; 2] {
        match self.family {
            Family::V4 => ["10.43.0.0/16", "10.50.0.0/16"],
            Family::V6 => ["fd00:43::/64", "fd00:50::/64"],
        }
    }
}

/// The port of ClusterIPs, VIPs and external IPs.
const PORT: u16 = 80;
/// The host port of every backend.
pub(crate) const HOST_PORT: u16 = 8088;

impl Service {
    pub(crate) fn cluster_ip(&self) -> IpAddr {
        self.plan.at(43, 10 + self.number)
    }

    pub(crate) fn vip(&self) -> IpAddr {
        match self.plan.family {
            Family::V4 => self.plan.at(0, 100 + self.number),
            Family::V6 => self.plan.at(10, 90 + self.number),
        }
    }

    pub(crate) fn external_ip(&self) -> IpAddr {
        self.plan.at(50, 10 + self.number)
    }

    pub(crate) fn node_port(&self) -> u16 {
        30_080 + u16::from(self.number)
    }

    /// The node that announces the VIP: the entry, unless only another one may.
    pub(crate) fn announcer(&self) -> usize {
        if self.local_outside { self.home } else { ENTRY }
    }

    /// Host ports are the pods', and asked for with one service for each.
    pub(crate) fn stands_for_its_pod(&self) -> bool {
        !self.local_outside && !self.local_inside
    }

    /// The only backend.
    pub(crate) fn backend(&self) -> String {
        format!("pod-{}-1", self.home)
    }

    pub(crate) fn backend_address(&self) -> IpAddr {
        self.plan.pod(self.home, 1)
    }
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
            Position::Lan => self.service.plan.client(),
            Position::Host(number) => self.service.plan.node(number),
            Position::Pod(node) => self.service.plan.pod(node, 2),
            Position::Hairpin => self.service.backend_address(),
        }
    }

    pub(crate) fn to(&self) -> SocketAddr {
        let plan = self.service.plan;
        let node_port = |ip: IpAddr| SocketAddr::new(ip, self.service.node_port());
        match self.target {
            Target::ClusterIp => (self.service.cluster_ip(), PORT).into(),
            Target::LoadBalancer => (self.service.vip(), PORT).into(),
            Target::ExternalIp => (self.service.external_ip(), PORT).into(),
            Target::OwnNodePort => node_port(plan.node(self.node().unwrap_or(ENTRY))),
            Target::EntryNodePort => node_port(plan.node(ENTRY)),
            Target::LoopbackNodePort => node_port(plan.loopback()),
            Target::HostPort => (plan.node(self.service.home), HOST_PORT).into(),
            Target::LoopbackHostPort => (plan.loopback(), HOST_PORT).into(),
        }
    }

    /// Whether such a question can be asked at all.
    fn is_legal(&self) -> bool {
        match self.target {
            Target::LoopbackNodePort => matches!(self.position, Position::Host(_)),
            // The LAN client has no node, and on the entry node both are one.
            Target::OwnNodePort => self.node().is_some(),
            Target::EntryNodePort => self.node() != Some(ENTRY),
            // It is the pod's and knows no policy, so one service for each pod.
            Target::HostPort => self.service.stands_for_its_pod(),
            Target::LoopbackHostPort => {
                self.service.stands_for_its_pod() && self.position == Position::Host(self.service.home)
            }
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
pub(crate) fn cells(plan: Plan) -> Vec<Cell> {
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
        Target::HostPort,
        Target::LoopbackHostPort,
    ];
    let mut all = Vec::new();
    for position in positions {
        for target in targets {
            for service in services(plan) {
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
pub(crate) fn manifests(plan: Plan) -> String {
    let mut text = String::new();
    for service in services(plan) {
        let policy = |local| if local { "Local" } else { "Cluster" };
        let (name, outside, inside) = (service.name, policy(service.local_outside), policy(service.local_inside));
        let (cluster_ip, vip, external) = (service.cluster_ip(), service.vip(), service.external_ip());
        let (node_port, home, entry) = (service.node_port(), service.home, service.announcer());
        let ip_family = plan.name();
        let (pod, address, echo) = (service.backend(), service.backend_address(), ECHO_PORT);
        text.push_str(&format!(
            "\
---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default, labels: {{entry: node-{entry}}}}}
spec:
  type: LoadBalancer
  loadBalancerIP: \"{vip}\"
  clusterIP: \"{cluster_ip}\"
  clusterIPs: [\"{cluster_ip}\"]
  ipFamilies: [{ip_family}]
  externalIPs: [\"{external}\"]
  externalTrafficPolicy: {outside}
  internalTrafficPolicy: {inside}
  ports:
    - {{name: http, port: {PORT}, nodePort: {node_port}, targetPort: {HTTP_PORT}}}
    - {{name: who, protocol: UDP, port: {PORT}, nodePort: {node_port}, targetPort: {echo}}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-1, namespace: default, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: {ip_family}
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
    let (first, last) = (services(plan)[0].vip(), services(plan)[5].vip());
    text.push_str(&format!(
        "\
---
apiVersion: cilium.io/v2
kind: CiliumLoadBalancerIPPool
metadata: {{name: pool}}
spec: {{blocks: [{{start: \"{first}\", stop: \"{last}\"}}]}}
"
    ));
    for number in [ENTRY, OTHER] {
        let address = plan.pod(number, 1);
        text.push_str(&format!(
            "\
---
apiVersion: v1
kind: Pod
metadata: {{name: pod-{number}-1, namespace: default, uid: uid-{number}, creationTimestamp: \"2026-01-01T00:00:00Z\"}}
spec:
  nodeName: node-{number}
  containers:
    - name: web
      ports:
        - {{name: http, containerPort: {HTTP_PORT}, hostPort: {HOST_PORT}}}
        - {{name: who, protocol: UDP, containerPort: {ECHO_PORT}, hostPort: {HOST_PORT}}}
status: {{podIPs: [{{ip: \"{address}\"}}]}}
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
        let address = plan.node(number);
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
