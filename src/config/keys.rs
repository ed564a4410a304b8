//! The keys that have an effect. Everything else about them is derived from this table: see the module's header.

use super::value::Kind;

/// A key of the configuration.
pub struct KeyDef {
    /// The file's name in the config directory, the flag, and (upper case, `_`) the environment variable.
    pub name: &'static str,
    /// An older name that means the same, or empty.
    pub alias: &'static str,
    /// Heading in documentation and help.
    pub group: &'static str,
    /// As it would be written.
    pub default: &'static str,
    /// What it does, one line.
    pub doc: &'static str,
    /// What a change of it costs.
    pub reload: Reload,
    /// The type and the place.
    pub(super) kind: Kind,
}

/// What applying a changed value costs. No key needs a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reload {
    /// Nothing: whoever uses it reads the new value.
    Live,
    /// Programs or maps are made anew and replace the old ones; connections go on.
    Reattach,
}

impl KeyDef {
    /// What may be written.
    pub fn allowed(&self) -> String {
        self.kind.allowed()
    }

    /// The type's short name, as a flag's placeholder.
    pub fn type_name(&self) -> &'static str {
        self.kind.name()
    }

    /// Whether the flag may stand alone, meaning `true`.
    pub fn is_switch(&self) -> bool {
        matches!(self.kind, Kind::Bool(_) | Kind::OptionalBool(_))
    }

    /// Whether several values make one.
    pub fn is_list(&self) -> bool {
        matches!(self.kind, Kind::Words(_) | Kind::Urls(_) | Kind::Cidrs(_))
    }

    /// The environment variable, with the preferred prefix.
    pub fn env(&self) -> String {
        format!("KINESIN_{}", self.name.to_uppercase().replace('-', "_"))
    }
}

/// The key called `name`, which may be an alias.
pub fn find(name: &str) -> Option<&'static KeyDef> {
    KEYS.iter().find(|key| key.name == name || (!key.alias.is_empty() && key.alias == name))
}

const fn live(group: &'static str, name: &'static str, default: &'static str, kind: Kind, doc: &'static str) -> KeyDef {
    KeyDef { name, alias: "", group, default, doc, reload: Reload::Live, kind }
}

const fn reattach(
    group: &'static str,
    name: &'static str,
    default: &'static str,
    kind: Kind,
    doc: &'static str,
) -> KeyDef {
    KeyDef { name, alias: "", group, default, doc, reload: Reload::Reattach, kind }
}

/// Sizes that Maglev tables may have; all prime.
const MAGLEV_SIZES: &[u32] = &kinesin_abi::MAGLEV_TABLE_SIZES;
/// The most entries of a map.
const CT_MAX: u32 = kinesin_core::sizing::BOUNDS.1;

const SOURCE: &str = "Sources";
const PATHS: &str = "Files and directories";
const DEVICES: &str = "Devices and families";
const SERVICES: &str = "Services";
const L2: &str = "L2 announcements";
const IPAM: &str = "Addresses for LoadBalancer Services";
const K8S: &str = "Kubernetes";
const OBSERVE: &str = "Logs, metrics and health";

/// Every key that has an effect, in the order of the documentation.
pub static KEYS: &[KeyDef] = &[
    live(
        SOURCE,
        "source",
        "kubernetes",
        Kind::Choice(|c| &mut c.source.kind),
        "Where objects come from: the Kubernetes API or a directory of YAML.",
    ),
    live(
        SOURCE,
        "manifests-dir",
        "",
        Kind::Path { optional: true, at: |c| &mut c.source.manifests_dir },
        "The directory that `source=manifests` reads and watches.",
    ),
    live(
        SOURCE,
        "lb-init-wait-timeout",
        "1m",
        Kind::Duration(|c| &mut c.services.init_wait),
        "How long to wait for the first complete lists before the state is reported as degraded; nothing is pruned before they are complete.",
    ),
    live(
        PATHS,
        "state-dir",
        "/var/run/kinesin",
        Kind::Path { optional: false, at: |c| &mut c.paths.state_dir },
        "Where the agent keeps its own files.",
    ),
    live(
        PATHS,
        "socket-path",
        "/var/run/kinesin/kinesin.sock",
        Kind::Path { optional: false, at: |c| &mut c.paths.socket },
        "The admin socket, which the command line talks to.",
    ),
    reattach(
        PATHS,
        "bpf-root",
        "/sys/fs/bpf",
        Kind::Path { optional: false, at: |c| &mut c.paths.bpf_root },
        "Where the BPF file system is mounted; pinned maps and links live in `kinesin/` under it.",
    ),
    reattach(
        PATHS,
        "cgroup-root",
        "",
        Kind::Path { optional: true, at: |c| &mut c.paths.cgroup_root },
        "The cgroup2 directory whose sockets are translated; empty uses the mount found in /proc/mounts.",
    ),
    reattach(
        DEVICES,
        "devices",
        "",
        Kind::Words(|c| &mut c.devices),
        "Devices that traffic from outside comes in on: names, `eth+` for a prefix, `!docker0` to exclude, first match wins; empty selects automatically.",
    ),
    live(DEVICES, "enable-ipv4", "true", Kind::Bool(|c| &mut c.families.ipv4), "Serve IPv4."),
    live(DEVICES, "enable-ipv6", "false", Kind::Bool(|c| &mut c.families.ipv6), "Serve IPv6."),
    reattach(
        SERVICES,
        "kube-proxy-replacement",
        "false",
        Kind::Bool(|c| &mut c.services.kube_proxy_replacement),
        "Do all of kube-proxy's work: NodePorts, LoadBalancer and external addresses, and local sockets.",
    ),
    reattach(
        SERVICES,
        "bpf-lb-sock",
        "",
        Kind::OptionalBool(|c| &mut c.services.socket_lb),
        "Translate service addresses when local sockets connect; always on with `kube-proxy-replacement=true`.",
    ),
    live(
        SERVICES,
        "bpf-lb-sock-terminate-pod-connections",
        "",
        Kind::OptionalBool(|c| &mut c.services.terminate_pods),
        "End sockets of pods, and not only of the host, that are connected to a backend that is gone; empty follows `bpf-lb-sock`.",
    ),
    live(
        SERVICES,
        "lb-sock-terminate-all-protos",
        "false",
        Kind::Bool(|c| &mut c.services.terminate_all_protos),
        "End TCP connections of sockets to such backends too, not only UDP ones.",
    ),
    live(
        SERVICES,
        "node-port-range",
        "30000,32767",
        Kind::Ports(|c| &mut c.services.node_port_range),
        "Ports that NodePorts come from; translated connections take their source ports from above it.",
    ),
    live(
        SERVICES,
        "node-port-bind-protection",
        "true",
        Kind::Bool(|c| &mut c.services.protect_node_ports),
        "Refuse to bind sockets of the node to NodePorts, where they would never see a packet.",
    ),
    live(
        SERVICES,
        "enable-auto-protect-node-port-range",
        "true",
        Kind::Bool(|c| &mut c.services.reserve_node_ports),
        "Where the node's own connections could take ports from `node-port-range`, add it to the kernel's reserved ports.",
    ),
    live(
        SERVICES,
        "nodeport-addresses",
        "",
        Kind::Cidrs(|c| &mut c.services.node_port_addresses),
        "Networks whose local addresses serve NodePorts; empty means all.",
    ),
    live(
        SERVICES,
        "map-verify-interval",
        "30s",
        Kind::Duration(|c| &mut c.services.verify_interval),
        "How often the services' maps are read back and compared with what they should hold.",
    ),
    KeyDef {
        name: "bpf-lb-algorithm",
        alias: "node-port-algorithm",
        group: SERVICES,
        default: "random",
        doc: "How a backend is selected: evenly at random, or by a Maglev table that is equal on all nodes.",
        reload: Reload::Live,
        kind: Kind::Choice(|c| &mut c.services.algorithm),
    },
    KeyDef {
        name: "bpf-lb-mode",
        alias: "node-port-mode",
        group: SERVICES,
        default: "auto",
        doc: "How packets get to backends on other nodes: with this node's address as source (`snat`), with the client's (`dsr`), the latter for TCP only (`hybrid`), or with the client's wherever that costs nothing, on the same segment, and `snat` elsewhere (`auto`). Connections keep the way that they began with.",
        reload: Reload::Live,
        kind: Kind::Choice(|c| &mut c.services.mode),
    },
    live(
        SERVICES,
        "bpf-lb-dsr-dispatch",
        "opt",
        Kind::Choice(|c| &mut c.services.dsr_dispatch),
        "How `dsr` and `hybrid` carry the client's address to nodes on other segments: `opt` addresses packets to the backend and says in an IPv4 option or IPv6 extension header which service they are for, `ipip` puts them inside another IP packet, `l2` leaves it at `snat`, which is also what nodes get that cannot take it. To nodes on the same segment frames go as they are whatever this says. `geneve` is not supported; it is reported and `l2` used.",
    ),
    KeyDef {
        name: "bpf-lb-acceleration",
        alias: "node-port-acceleration",
        group: SERVICES,
        default: "disabled",
        doc: "Let network drivers forward packets of known connections that leave the node again (XDP), before the kernel allocates anything for them: on every device (`native`; one whose driver cannot is a problem, and goes on without), or where the driver can (`best-effort`).",
        reload: Reload::Live,
        kind: Kind::Choice(|c| &mut c.services.acceleration),
    },
    live(
        SERVICES,
        "enable-host-legacy-routing",
        "true",
        Kind::Bool(|c| &mut c.services.legacy_host_routing),
        "Hand packets to pods of this node to the host's stack once they are translated, so that netfilter and whatever the pods' network is made of see them. `false` sends them straight to the pod's end of its veth pair; only for networks that neither filter nor masquerade what their pods answer, since answers go by the stack all the same.",
    ),
    live(
        SERVICES,
        "bpf-lb-mode-annotation",
        "false",
        Kind::Bool(|c| &mut c.services.mode_annotation),
        "Let the annotation `service.cilium.io/forwarding-mode` (`dsr` or `snat`) of a Service replace `bpf-lb-mode`; not with `hybrid`.",
    ),
    live(
        SERVICES,
        "bpf-lb-algorithm-annotation",
        "false",
        Kind::Bool(|c| &mut c.services.algorithm_annotation),
        "Let the annotation `service.cilium.io/lb-algorithm` (`random` or `maglev`) of a Service replace `bpf-lb-algorithm`.",
    ),
    reattach(
        SERVICES,
        "bpf-lb-maglev-table-size",
        "16381",
        Kind::OneOf { options: MAGLEV_SIZES, at: |c| &mut c.services.maglev_table_size },
        "Entries of a Maglev table, about a hundred for each backend that a Service may have: 4 bytes each, of each Service on each node. Equal on all nodes.",
    ),
    live(
        SERVICES,
        "bpf-lb-maglev-hash-seed",
        "JLfvgnHc2kaSUFaI",
        Kind::Seed(|c| &mut c.services.maglev_seed),
        "Seed of the Maglev tables; equal on all nodes.",
    ),
    reattach(
        SERVICES,
        "bpf-lb-map-max",
        "65536",
        Kind::Int { min: 16, max: CT_MAX, at: |c| &mut c.services.sizes.lb },
        "Entries of each load balancing map that has no key of its own.",
    ),
    reattach(
        SERVICES,
        "bpf-lb-service-map-max",
        "0",
        Kind::Int { min: 0, max: CT_MAX, at: |c| &mut c.services.sizes.services },
        "Frontends, and a quarter of the members of backend sets; 0 takes bpf-lb-map-max.",
    ),
    reattach(
        SERVICES,
        "bpf-lb-service-backend-map-max",
        "0",
        Kind::Int { min: 0, max: CT_MAX, at: |c| &mut c.services.sizes.backends },
        "Backends; 0 takes bpf-lb-map-max.",
    ),
    reattach(
        SERVICES,
        "bpf-lb-affinity-map-max",
        "0",
        Kind::Int { min: 0, max: CT_MAX, at: |c| &mut c.services.sizes.affinity },
        "Clients of services with session affinity; 0 takes bpf-lb-map-max, or less where the agent's memory is limited.",
    ),
    reattach(
        SERVICES,
        "bpf-lb-source-range-map-max",
        "0",
        Kind::Int { min: 0, max: CT_MAX, at: |c| &mut c.services.sizes.ranges },
        "Source ranges, each counted once per service port; 0 takes bpf-lb-map-max.",
    ),
    reattach(
        SERVICES,
        "bpf-lb-maglev-map-max",
        "0",
        Kind::Int { min: 0, max: CT_MAX, at: |c| &mut c.services.sizes.maglev },
        "Maglev tables; 0 takes bpf-lb-map-max.",
    ),
    reattach(
        SERVICES,
        "bpf-map-dynamic-size-ratio",
        "0.0025",
        Kind::Ratio(|c| &mut c.services.sizes.ratio),
        "The share of the memory that tables of connections and sockets may take: of the machine's, or of the agent's limit where that is less; 0 takes 524288, 262144 and 262144 entries.",
    ),
    reattach(
        SERVICES,
        "bpf-ct-global-tcp-max",
        "0",
        Kind::Int { min: 0, max: CT_MAX, at: |c| &mut c.services.sizes.tcp },
        "Entries for established TCP connections, two for each; 0 follows bpf-map-dynamic-size-ratio, from 131072 on.",
    ),
    reattach(
        SERVICES,
        "bpf-ct-global-any-max",
        "0",
        Kind::Int { min: 0, max: CT_MAX, at: |c| &mut c.services.sizes.any },
        "Entries for other flows, two for each: UDP, and TCP connections that are not established; 0 follows bpf-map-dynamic-size-ratio, from 65536 on.",
    ),
    reattach(
        SERVICES,
        "bpf-nat-global-max",
        "0",
        Kind::Int { min: 0, max: CT_MAX, at: |c| &mut c.services.sizes.nat },
        "Translated connections have no table of their own: the least that both tables of connections together hold, where they are left to the ratio.",
    ),
    reattach(
        SERVICES,
        "bpf-sock-rev-map-max",
        "0",
        Kind::Int { min: 0, max: CT_MAX, at: |c| &mut c.services.sizes.sockets },
        "Translated sockets; 0 follows bpf-map-dynamic-size-ratio, from 65536 on.",
    ),
    live(
        SERVICES,
        "bpf-ct-timeout-service-tcp",
        "2h13m20s",
        Kind::Duration(|c| &mut c.services.timeouts.service_tcp),
        "How long a silent established TCP connection of a service is remembered.",
    ),
    live(
        SERVICES,
        "bpf-ct-timeout-service-tcp-grace",
        "1m",
        Kind::Duration(|c| &mut c.services.timeouts.grace),
        "The same while its backend terminates or after it is gone.",
    ),
    live(
        SERVICES,
        "bpf-ct-timeout-service-any",
        "1m",
        Kind::Duration(|c| &mut c.services.timeouts.service_any),
        "How long a silent flow of another protocol is remembered.",
    ),
    live(
        SERVICES,
        "bpf-ct-timeout-regular-tcp",
        "2h13m20s",
        Kind::Duration(|c| &mut c.services.timeouts.regular_tcp),
        "A second limit for established TCP connections whose source address is translated; the shorter one counts.",
    ),
    live(
        SERVICES,
        "bpf-ct-timeout-regular-any",
        "1m",
        Kind::Duration(|c| &mut c.services.timeouts.regular_any),
        "A second limit for flows of other protocols whose source address is translated; the shorter one counts.",
    ),
    live(
        SERVICES,
        "bpf-ct-timeout-regular-tcp-syn",
        "1m",
        Kind::Duration(|c| &mut c.services.timeouts.syn),
        "How long a TCP connection is remembered that is not established.",
    ),
    live(
        SERVICES,
        "bpf-ct-timeout-regular-tcp-fin",
        "10s",
        Kind::Duration(|c| &mut c.services.timeouts.fin),
        "How long a TCP connection is remembered that was reset or closed from both sides.",
    ),
    live(
        SERVICES,
        "conntrack-gc-interval",
        "0s",
        Kind::Duration(|c| &mut c.services.gc_interval),
        "How often expired connections are looked for; 0s adapts it, from 10 seconds to 12 hours, to how many there are.",
    ),
    live(
        SERVICES,
        "conntrack-gc-max-interval",
        "0s",
        Kind::Duration(|c| &mut c.services.gc_max_interval),
        "The longest interval that adapting comes to; 0s means 12 hours.",
    ),
    reattach(
        SERVICES,
        "bpf-fragments-map-max",
        "8192",
        Kind::Int { min: 1, max: 65_535, at: |c| &mut c.services.fragments_max },
        "Packets in fragments that may be on their way at once.",
    ),
    live(
        SERVICES,
        "enable-ipv4-fragment-tracking",
        "true",
        Kind::Bool(|c| &mut c.services.fragments4),
        "Translate IPv4 packets in fragments; without it they are dropped.",
    ),
    live(
        SERVICES,
        "enable-ipv6-fragment-tracking",
        "true",
        Kind::Bool(|c| &mut c.services.fragments6),
        "Translate IPv6 packets in fragments; without it they are dropped.",
    ),
    live(
        SERVICES,
        "enable-service-topology",
        "false",
        Kind::Bool(|c| &mut c.services.topology),
        "Keep traffic in the zone, or on the node, where a Service asks for it and its EndpointSlices have hints.",
    ),
    live(
        SERVICES,
        "bpf-lb-external-clusterip",
        "false",
        Kind::Bool(|c| &mut c.services.external_cluster_ip),
        "Serve ClusterIPs to clients outside the cluster too.",
    ),
    live(
        SERVICES,
        "bpf-lb-source-range-all-types",
        "false",
        Kind::Bool(|c| &mut c.services.source_range_all_types),
        "Restrict clients by `loadBalancerSourceRanges` at all addresses of a Service, not only at its load balancer's.",
    ),
    live(
        SERVICES,
        "bpf-lb-enable-wildcard-entries",
        "true",
        Kind::Bool(|c| &mut c.services.wildcards),
        "Drop what comes to a service's address on a port that no service has, instead of forwarding it back to the gateway.",
    ),
    live(
        SERVICES,
        "enable-sctp",
        "true",
        Kind::Bool(|c| &mut c.services.sctp),
        "Serve SCTP ports of Services. Their numbers are not rewritten: `port` and `targetPort` must be equal.",
    ),
    live(
        SERVICES,
        "enable-health-check-nodeport",
        "true",
        Kind::Bool(|c| &mut c.services.health_check_node_ports),
        "Answer on `healthCheckNodePort` of LoadBalancer Services with `externalTrafficPolicy: Local`.",
    ),
    live(
        SERVICES,
        "enable-health-check-loadbalancer-ip",
        "false",
        Kind::Bool(|c| &mut c.services.health_check_on_load_balancer),
        "Answer health checks at the load balancer's addresses too, not only at the node's.",
    ),
    live(
        SERVICES,
        "service-no-backend-response",
        "reject",
        Kind::Choice(|c| &mut c.services.no_backend),
        "What clients of a service without backends get: ICMP port unreachable, or nothing.",
    ),
    live(
        SERVICES,
        "vip-ping",
        "true",
        Kind::Bool(|c| &mut c.services.vip_ping),
        "Answer ICMP echo requests to LoadBalancer and announced addresses.",
    ),
    live(
        SERVICES,
        "k8s-service-proxy-name",
        "",
        Kind::Text(|c| &mut c.services.proxy_name),
        "Serve only Services whose label `service.kubernetes.io/service-proxy-name` has this value; empty: those without it.",
    ),
    live(
        L2,
        "enable-l2-announcements",
        "false",
        Kind::Bool(|c| &mut c.l2.enabled),
        "Answer for service addresses on the LAN, as CiliumL2AnnouncementPolicy objects say.",
    ),
    live(
        L2,
        "l2-announcements-lease-duration",
        "15s",
        Kind::Duration(|c| &mut c.l2.lease_duration),
        "How long a node counts as present after its last sign of life; its programs go on answering for two thirds of it.",
    ),
    live(
        L2,
        "l2-announcements-renew-deadline",
        "5s",
        Kind::Duration(|c| &mut c.l2.renew_deadline),
        "How often a node renews its presence at the latest.",
    ),
    live(
        L2,
        "l2-announcements-retry-period",
        "2s",
        Kind::Duration(|c| &mut c.l2.retry_period),
        "How long to wait after a failed renewal.",
    ),
    live(
        L2,
        "agent-liveness-update-interval",
        "1s",
        Kind::Duration(|c| &mut c.l2.liveness_interval),
        "How often the agent tells its programs that it is alive.",
    ),
    live(
        IPAM,
        "enable-lb-ipam",
        "true",
        Kind::Bool(|c| &mut c.lb_ipam.enabled),
        "Give addresses from CiliumLoadBalancerIPPool objects to LoadBalancer Services.",
    ),
    live(
        IPAM,
        "default-lb-service-ipam",
        "lbipam",
        Kind::Choice(|c| &mut c.lb_ipam.default_for),
        "Who gives addresses to LoadBalancer Services that name no loadBalancerClass.",
    ),
    live(
        K8S,
        "k8s-kubeconfig-path",
        "",
        Kind::Path { optional: true, at: |c| &mut c.kubernetes.kubeconfig },
        "The kubeconfig to use; empty uses the pod's service account.",
    ),
    live(
        K8S,
        "k8s-api-server-urls",
        "",
        Kind::Urls(|c| &mut c.kubernetes.api_servers),
        "API servers, in order of preference; empty uses the one of kubeconfig or of the pod's environment.",
    ),
    live(
        K8S,
        "k8s-namespace",
        "default",
        Kind::Text(|c| &mut c.kubernetes.namespace),
        "The namespace of the agents' Leases.",
    ),
    live(
        K8S,
        "k8s-client-qps",
        "10",
        Kind::Rate(|c| &mut c.kubernetes.qps),
        "Requests per second to the API server, on average.",
    ),
    live(
        K8S,
        "k8s-client-burst",
        "20",
        Kind::Int { min: 1, max: 100_000, at: |c| &mut c.kubernetes.burst },
        "Requests to the API server that may go out at once.",
    ),
    live(
        K8S,
        "skip-crd-creation",
        "false",
        Kind::Bool(|c| &mut c.kubernetes.skip_crd_creation),
        "Leave the custom resource definitions to somebody else.",
    ),
    live(
        OBSERVE,
        "kube-proxy-replacement-healthz-bind-address",
        "",
        Kind::Listen(|c| &mut c.observe.healthz),
        "Where `/healthz` and `/livez` answer as kube-proxy's do: 503 while the agent is unhealthy, `/healthz` also when the node is going away.",
    ),
    live(
        OBSERVE,
        "prometheus-serve-addr",
        "",
        Kind::Listen(|c| &mut c.observe.prometheus),
        "Where `/metrics`, `/livez` and `/readyz` answer.",
    ),
    live(OBSERVE, "log-level", "", Kind::Level(|c| &mut c.observe.level), "How much is logged; empty means info."),
    live(
        OBSERVE,
        "debug",
        "false",
        Kind::Bool(|c| &mut c.observe.debug),
        "Log at level debug where `log-level` is not set.",
    ),
];
