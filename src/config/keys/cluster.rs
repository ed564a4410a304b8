//! Addresses for Services and who answers for them, the API server, and what is told.

use super::{KeyDef, live};
use crate::config::value::Kind;

const L2: &str = "L2 announcements";
const IPAM: &str = "Addresses for LoadBalancer Services";
const K8S: &str = "Kubernetes";
const OBSERVE: &str = "Logs, metrics and health";

pub(super) static KEYS: &[KeyDef] = &[
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
