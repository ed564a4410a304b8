//! The validated configuration: one typed struct, made by [`super::load`] and never changed afterwards.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
pub use kinesin_core::devices::Families;
use kinesin_core::services::{Dispatch, Forwarding};

/// A setting with a closed set of spellings.
pub trait Choice {
    /// All spellings, the canonical ones.
    fn options(&self) -> &'static [&'static str];
    /// Takes the value spelled `text`; false when there is none.
    fn choose(&mut self, text: &str) -> bool;
    /// The current value's spelling.
    fn spelling(&self) -> &'static str;
}

macro_rules! choices {
    ($($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal $(| $alias:literal)*,)+ })+) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant,)+ }

        impl Choice for $name {
            fn options(&self) -> &'static [&'static str] {
                &[$($text),+]
            }
            fn choose(&mut self, text: &str) -> bool {
                *self = match text { $($text $(| $alias)* => Self::$variant,)+ _ => return false };
                true
            }
            fn spelling(&self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.spelling())
            }
        }
    )+};
}

choices! {
    /// Where objects come from (`source`).
    SourceKind {
        /// The Kubernetes API.
        #[default]
        Kubernetes = "kubernetes",
        /// A directory of YAML.
        Manifests = "manifests",
    }
    /// How a backend is selected (`bpf-lb-algorithm`).
    Algorithm {
        /// Evenly at random.
        #[default]
        Random = "random",
        /// By a Maglev table, equal on all nodes.
        Maglev = "maglev",
    }
    /// How packets get to backends on other nodes (`bpf-lb-mode`).
    LbMode {
        /// As they are to nodes on the same segment, with this node's address as source to others.
        #[default]
        Auto = "auto",
        /// With this node's address as source.
        Snat = "snat",
        /// With the client's address, as `bpf-lb-dsr-dispatch` says.
        Dsr = "dsr",
        /// As `dsr` for TCP, as `snat` for everything else.
        Hybrid = "hybrid",
    }
    /// How packets keep the client's address on the way to other nodes (`bpf-lb-dsr-dispatch`).
    DsrDispatch {
        /// With an IPv4 option or IPv6 extension header.
        #[default]
        Opt = "opt",
        /// Inside another IP packet.
        Ipip = "ipip",
        /// Inside a Geneve tunnel.
        Geneve = "geneve",
        /// As they are, on one segment.
        L2 = "l2",
    }
    /// Whether drivers run a program too (`bpf-lb-acceleration`).
    Acceleration {
        /// No.
        #[default]
        Disabled = "disabled",
        /// Yes; a device whose driver cannot is a problem.
        Native = "native",
        /// Where the driver can.
        BestEffort = "best-effort",
    }
    /// What a client of a service without backends gets (`service-no-backend-response`).
    NoBackend {
        /// ICMP port unreachable.
        #[default]
        Reject = "reject",
        /// Silence.
        Drop = "drop",
    }
    /// Who gives addresses to LoadBalancer Services without a class (`default-lb-service-ipam`).
    DefaultIpam {
        /// LB-IPAM, from pools.
        #[default]
        LbIpam = "lbipam",
        /// Node-IPAM: the nodes' own addresses.
        NodeIpam = "nodeipam",
        /// Nobody.
        None = "none",
    }
    /// How much is logged (`log-level`).
    LogLevel {
        /// Only failures.
        Error = "error",
        /// And what an operator should look at.
        Warn = "warn" | "warning",
        /// And what changed.
        #[default]
        Info = "info",
        /// And every event.
        Debug = "debug",
        /// And everything.
        Trace = "trace",
    }
}

/// Everything that can be configured. `Default` is blank, not the defaults: use [`super::load`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config {
    /// Short hash of the effective settings: equal on two nodes exactly when they run with the same settings, because
    /// the node's name is left out.
    pub generation: String,
    /// This node: `K8S_NODE_NAME`, else the host's name.
    pub node_name: String,
    /// Where objects come from.
    pub source: SourceConfig,
    /// Files and directories.
    pub paths: Paths,
    /// `devices`: names, `prefix+` wildcards and `!` exclusions in order, first match wins; empty selects automatically.
    pub devices: Vec<String>,
    /// Address families: `enable-ipv4` and `enable-ipv6`, at least one of which is on.
    pub families: Families,
    /// Service load balancing.
    pub services: Services,
    /// L2 announcements.
    pub l2: L2,
    /// Addresses for LoadBalancer Services.
    pub lb_ipam: LbIpam,
    /// The Kubernetes API and its client.
    pub kubernetes: Kubernetes,
    /// Logs, metrics and health.
    pub observe: Observe,
}

/// See [`Config::source`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceConfig {
    /// `source`
    pub kind: SourceKind,
    /// `manifests-dir`; not empty when `kind` is [`SourceKind::Manifests`].
    pub manifests_dir: PathBuf,
}

/// See [`Config::paths`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Paths {
    /// `state-dir`
    pub state_dir: PathBuf,
    /// `socket-path`
    pub socket: PathBuf,
    /// `bpf-root`: where bpffs is, or is to be, mounted.
    pub bpf_root: PathBuf,
    /// `cgroup-root`; empty means the cgroup2 mount found in `/proc/mounts`.
    pub cgroup_root: PathBuf,
}

/// See [`Config::services`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Services {
    /// `kube-proxy-replacement`
    pub kube_proxy_replacement: bool,
    /// `bpf-lb-sock`; `None` follows `kube-proxy-replacement`. Ask [`Services::socket_lb`].
    pub socket_lb: Option<bool>,
    /// `node-port-range`
    pub node_port_range: PortRange,
    /// `node-port-bind-protection`
    pub protect_node_ports: bool,
    /// `enable-auto-protect-node-port-range`
    pub reserve_node_ports: bool,
    /// `nodeport-addresses`; empty means all.
    pub node_port_addresses: Vec<IpNet>,
    /// `bpf-lb-algorithm`
    pub algorithm: Algorithm,
    /// `bpf-lb-mode`
    pub mode: LbMode,
    /// `bpf-lb-dsr-dispatch`
    pub dsr_dispatch: DsrDispatch,
    /// `enable-host-legacy-routing`; `None` leaves it to what uses the host's stack. Ask [`crate::world::World::host_routing`].
    pub legacy_host_routing: Option<bool>,
    /// `bpf-lb-acceleration`
    pub acceleration: Acceleration,
    /// `bpf-lb-mode-annotation`
    pub mode_annotation: bool,
    /// `bpf-lb-algorithm-annotation`
    pub algorithm_annotation: bool,
    /// `bpf-lb-maglev-table-size`
    pub maglev_table_size: u32,
    /// `bpf-lb-maglev-hash-seed`
    pub maglev_seed: MaglevSeed,
    /// How large the maps are.
    pub sizes: SizeKeys,
    /// `bpf-lb-sock-terminate-pod-connections`; `None` follows `bpf-lb-sock`.
    pub terminate_pods: Option<bool>,
    /// `lb-sock-terminate-all-protos`
    pub terminate_all_protos: bool,
    /// For how long silent connections are kept.
    pub timeouts: CtTimeouts,
    /// `conntrack-gc-interval`; zero leaves it to what is found.
    pub gc_interval: Duration,
    /// `conntrack-gc-max-interval`; zero means twelve hours.
    pub gc_max_interval: Duration,
    /// `bpf-fragments-map-max`, entries.
    pub fragments_max: u32,
    /// `enable-ipv4-fragment-tracking`
    pub fragments4: bool,
    /// `enable-ipv6-fragment-tracking`
    pub fragments6: bool,
    /// `enable-service-topology`
    pub topology: bool,
    /// `bpf-lb-external-clusterip`
    pub external_cluster_ip: bool,
    /// `enable-sctp`
    pub sctp: bool,
    /// `bpf-lb-source-range-all-types`
    pub source_range_all_types: bool,
    /// `bpf-lb-enable-wildcard-entries`
    pub wildcards: bool,
    /// `enable-health-check-nodeport`
    pub health_check_node_ports: bool,
    /// `enable-health-check-loadbalancer-ip`
    pub health_check_on_load_balancer: bool,
    /// `service-no-backend-response`
    pub no_backend: NoBackend,
    /// `vip-ping`
    pub vip_ping: bool,
    /// `k8s-service-proxy-name`; empty means Services without that label.
    pub proxy_name: String,
    /// `map-verify-interval`
    pub verify_interval: Duration,
    /// `lb-init-wait-timeout`
    pub init_wait: Duration,
}

impl Services {
    /// Whether sockets on this node are translated at connect time.
    pub fn socket_lb(&self) -> bool {
        self.kube_proxy_replacement || self.socket_lb.unwrap_or(false)
    }

    /// How packets get to backends on other nodes.
    pub fn forwarding(&self) -> Forwarding {
        match self.mode {
            LbMode::Snat => Forwarding::all(Dispatch::Snat),
            LbMode::Auto => Forwarding::all(Dispatch::L2),
            LbMode::Dsr => Forwarding::all(self.dispatch()),
            LbMode::Hybrid => Forwarding { tcp: self.dispatch(), other: Dispatch::Snat },
        }
    }

    /// What `dsr` stands for.
    fn dispatch(&self) -> Dispatch {
        match self.dsr_dispatch {
            DsrDispatch::Ipip => Dispatch::Ipip,
            DsrDispatch::Opt => Dispatch::Opt,
            DsrDispatch::Geneve | DsrDispatch::L2 => Dispatch::L2,
        }
    }

    /// How packets of some Service may get to nodes on other segments with the client's address; as [`Dispatch::L2`] they
    /// do not.
    pub fn beyond(&self) -> Dispatch {
        let dsr = self.mode_annotation || matches!(self.mode, LbMode::Dsr | LbMode::Hybrid);
        if dsr { self.dispatch() } else { Dispatch::L2 }
    }

    /// Whether packets may be handed on to other nodes as they are.
    pub fn hands_on(&self) -> bool {
        self.mode_annotation || self.mode != LbMode::Snat
    }

    /// What `dsr` means in an annotation; `None` while annotations do not count.
    pub fn dsr_by_annotation(&self) -> Option<Forwarding> {
        self.mode_annotation.then(|| Forwarding::all(self.dispatch()))
    }

    /// Whether sockets of pods are ended when their backend is gone, too.
    pub fn terminates_pod_connections(&self) -> bool {
        self.terminate_pods.unwrap_or_else(|| self.socket_lb())
    }

    /// First and last source port of translated connections: what is above the NodePorts.
    pub fn snat_ports(&self) -> (u16, u16) {
        (self.node_port_range.last.saturating_add(1), u16::MAX)
    }
}

/// Entries of maps; 0 leaves a size to another key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SizeKeys {
    /// `bpf-map-dynamic-size-ratio`, in millionths.
    pub ratio: Ratio,
    /// `bpf-lb-map-max`; not 0.
    pub lb: u32,
    /// `bpf-lb-service-map-max`
    pub services: u32,
    /// `bpf-lb-service-backend-map-max`
    pub backends: u32,
    /// `bpf-lb-affinity-map-max`
    pub affinity: u32,
    /// `bpf-lb-source-range-map-max`
    pub ranges: u32,
    /// `bpf-lb-maglev-map-max`
    pub maglev: u32,
    /// `bpf-sock-rev-map-max`
    pub sockets: u32,
    /// `bpf-ct-global-tcp-max`
    pub tcp: u32,
    /// `bpf-ct-global-any-max`
    pub any: u32,
    /// `bpf-nat-global-max`
    pub nat: u32,
}

/// A share from 0 to 1, in millionths, so that it can be compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ratio(pub u32);

impl SizeKeys {
    /// What follows from the keys for a machine; the second part is what cannot go well.
    pub fn resolve(&self, memory: kinesin_core::sizing::Memory) -> (kinesin_core::sizing::Sizes, Vec<String>) {
        let wishes = kinesin_core::sizing::Wishes {
            ratio: self.ratio.0 as f32 / 1e6,
            lb: self.lb,
            services: self.services,
            backends: self.backends,
            maglev: self.maglev,
            ranges: self.ranges,
            affinity: self.affinity,
            sockets: self.sockets,
            tcp: self.tcp,
            any: self.any,
            nat: self.nat,
        };
        kinesin_core::sizing::sizes(memory, &wishes)
    }
}

/// The `bpf-ct-timeout-*` keys, whole seconds from 1 on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CtTimeouts {
    /// `bpf-ct-timeout-service-tcp`
    pub service_tcp: Duration,
    /// `bpf-ct-timeout-service-any`
    pub service_any: Duration,
    /// `bpf-ct-timeout-service-tcp-grace`
    pub grace: Duration,
    /// `bpf-ct-timeout-regular-tcp`
    pub regular_tcp: Duration,
    /// `bpf-ct-timeout-regular-any`
    pub regular_any: Duration,
    /// `bpf-ct-timeout-regular-tcp-syn`
    pub syn: Duration,
    /// `bpf-ct-timeout-regular-tcp-fin`
    pub fin: Duration,
}

impl CtTimeouts {
    /// As the programs read them.
    pub fn to_abi(&self) -> kinesin_abi::Timeouts {
        let seconds = |duration: &Duration| u32::try_from(duration.as_secs()).unwrap_or(u32::MAX).max(1);
        kinesin_abi::Timeouts {
            service_tcp: seconds(&self.service_tcp),
            service_any: seconds(&self.service_any),
            regular_tcp: seconds(&self.regular_tcp),
            regular_any: seconds(&self.regular_any),
            syn: seconds(&self.syn),
            fin: seconds(&self.fin),
            grace: seconds(&self.grace),
        }
    }
}

/// See [`Config::l2`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct L2 {
    /// `enable-l2-announcements`
    pub enabled: bool,
    /// `l2-announcements-lease-duration`
    pub lease_duration: Duration,
    /// `l2-announcements-renew-deadline`, shorter than the lease.
    pub renew_deadline: Duration,
    /// `l2-announcements-retry-period`, shorter than the renew deadline.
    pub retry_period: Duration,
    /// `agent-liveness-update-interval`
    pub liveness_interval: Duration,
}

/// See [`Config::lb_ipam`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LbIpam {
    /// `enable-lb-ipam`
    pub enabled: bool,
    /// `default-lb-service-ipam`
    pub default_for: DefaultIpam,
}

/// See [`Config::kubernetes`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Kubernetes {
    /// `k8s-kubeconfig-path`; empty means the pod's service account.
    pub kubeconfig: PathBuf,
    /// `k8s-api-server-urls`, in order of preference; empty means what kubeconfig or the environment says.
    pub api_servers: Vec<String>,
    /// `k8s-namespace`: where Leases live.
    pub namespace: String,
    /// `k8s-client-qps`, requests per second.
    pub qps: f32,
    /// `k8s-client-burst`, requests.
    pub burst: u32,
    /// `skip-crd-creation`
    pub skip_crd_creation: bool,
}

/// See [`Config::observe`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observe {
    /// `kube-proxy-replacement-healthz-bind-address`
    pub healthz: Option<ListenAddr>,
    /// `prometheus-serve-addr`
    pub prometheus: Option<ListenAddr>,
    /// `log-level`; `None` means `info`, or `debug` with `debug=true`. Ask [`Observe::log_level`].
    pub level: Option<LogLevel>,
    /// `debug`
    pub debug: bool,
}

impl Observe {
    /// The level to log at.
    pub fn log_level(&self) -> LogLevel {
        self.level.unwrap_or(if self.debug { LogLevel::Debug } else { LogLevel::Info })
    }
}

/// Ports, both inclusive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortRange {
    /// The first port.
    pub first: u16,
    /// The last port, at least `first`.
    pub last: u16,
}

impl PortRange {
    /// All ports of it.
    pub fn ports(self) -> std::ops::RangeInclusive<u16> {
        self.first..=self.last
    }
}

/// 12 bytes that all nodes share, so that their Maglev tables agree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MaglevSeed {
    /// The decoded seed.
    pub bytes: [u8; 12],
    /// As written: base64.
    pub text: String,
}

/// Where a server listens, as Go programs write it: no host means every address of both families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenAddr {
    /// The only address, or all of them.
    pub ip: Option<IpAddr>,
    /// The port; 0 lets the kernel choose.
    pub port: u16,
}

impl ListenAddr {
    /// What to bind to, in order: the first that works serves. A host without IPv6 refuses the first of two.
    pub fn candidates(&self) -> Vec<SocketAddr> {
        match self.ip {
            Some(ip) => vec![SocketAddr::new(ip, self.port)],
            None => [IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)]
                .map(|ip| SocketAddr::new(ip, self.port))
                .to_vec(),
        }
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            Some(ip) => write!(f, "{}", SocketAddr::new(ip, self.port)),
            None => write!(f, ":{}", self.port),
        }
    }
}
