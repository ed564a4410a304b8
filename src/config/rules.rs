//! Rules that involve more than one key: adjustments (used in another way, with a warning) and contradictions (nothing
//! sensible can be done).

use std::time::Duration;

use super::model::{Config, DsrDispatch, LbMode, SourceKind};
use super::value::format_duration;

/// Keys whose values cannot be used together.
pub(super) struct Contradiction {
    /// All keys that the rule reads.
    pub(super) keys: &'static [&'static str],
    /// What is wrong, with the fix.
    pub(super) message: String,
}

/// The first contradiction of `config`, if any.
pub(super) fn contradiction(config: &Config) -> Option<Contradiction> {
    if !config.families.ipv4 && !config.families.ipv6 {
        return Some(Contradiction {
            keys: &["enable-ipv4", "enable-ipv6"],
            message: "enable-ipv4 and enable-ipv6 are both false, so there is nothing to serve: set one to true".into(),
        });
    }
    if config.source.kind == SourceKind::Manifests && config.source.manifests_dir.as_os_str().is_empty() {
        return Some(Contradiction {
            keys: &["source", "manifests-dir"],
            message: "source=manifests needs a directory to read: set manifests-dir, or source=kubernetes".into(),
        });
    }
    None
}

/// Makes values usable that are allowed alone but not together, and says so.
pub(super) fn adjust(config: &mut Config) -> Vec<String> {
    let mut warnings = Vec::new();
    connections(config, &mut warnings);
    dsr_dispatch(config, &mut warnings);
    lease_timing(config, &mut warnings);
    combinations(config, &mut warnings);
    warnings
}

/// The programs count whole seconds, and a connection that is forgotten at once is none.
fn connections(config: &mut Config, warnings: &mut Vec<String>) {
    let timeouts = &mut config.services.timeouts;
    for (key, value) in [
        ("bpf-ct-timeout-service-tcp", &mut timeouts.service_tcp),
        ("bpf-ct-timeout-service-any", &mut timeouts.service_any),
        ("bpf-ct-timeout-service-tcp-grace", &mut timeouts.grace),
        ("bpf-ct-timeout-regular-tcp", &mut timeouts.regular_tcp),
        ("bpf-ct-timeout-regular-any", &mut timeouts.regular_any),
        ("bpf-ct-timeout-regular-tcp-syn", &mut timeouts.syn),
        ("bpf-ct-timeout-regular-tcp-fin", &mut timeouts.fin),
    ] {
        if *value < Duration::from_secs(1) {
            warnings.push(format!("{key}={} is shorter than a second: using 1s", format_duration(*value)));
            *value = Duration::from_secs(1);
        }
    }
}

fn dsr_dispatch(config: &mut Config, warnings: &mut Vec<String>) {
    let services = &mut config.services;
    if services.mode == LbMode::Hybrid && services.mode_annotation {
        warnings.push(
            "bpf-lb-mode-annotation=true does not go with bpf-lb-mode=hybrid: annotations of Services do not count; use another mode"
                .into(),
        );
        services.mode_annotation = false;
    }
    let asked = services.dsr_dispatch;
    let used = matches!(services.mode, LbMode::Dsr | LbMode::Hybrid) || services.mode_annotation;
    if used && asked == DsrDispatch::Geneve {
        warnings.push(format!(
            "bpf-lb-dsr-dispatch={asked} is not supported: using l2, which keeps clients' addresses towards nodes on the same segment; set opt or ipip for those beyond routers"
        ));
        services.dsr_dispatch = DsrDispatch::L2;
    }
}

/// The times of a lease must fit into each other; these are the limits and replacements that Cilium documents.
fn lease_timing(config: &mut Config, warnings: &mut Vec<String>) {
    let l2 = &mut config.l2;
    let mut replace = |key: &str, value: &mut Duration, with: Duration, why: &str| {
        warnings.push(format!("{key}={} {why}: using {}", format_duration(*value), format_duration(with)));
        *value = with;
    };
    const LEASE: &str = "l2-announcements-lease-duration";
    const RENEW: &str = "l2-announcements-renew-deadline";
    const RETRY: &str = "l2-announcements-retry-period";
    if l2.lease_duration < Duration::from_secs(1) {
        replace(LEASE, &mut l2.lease_duration, Duration::from_secs(1), "is shorter than a Lease can express");
    }
    if l2.renew_deadline.is_zero() {
        replace(RENEW, &mut l2.renew_deadline, Duration::from_secs(1), "is no time at all");
    }
    if l2.retry_period.is_zero() {
        replace(RETRY, &mut l2.retry_period, Duration::from_millis(200), "is no time at all");
    }
    if l2.lease_duration <= l2.renew_deadline {
        let half = l2.lease_duration / 2;
        replace(RENEW, &mut l2.renew_deadline, half, "is not shorter than the lease");
    }
    // Retries are spread by up to a fifth.
    if l2.renew_deadline <= l2.retry_period.mul_f64(1.2) {
        let half = l2.renew_deadline / 2;
        replace(RETRY, &mut l2.retry_period, half, "leaves no time for a second try");
    }
    if l2.liveness_interval.is_zero() || l2.liveness_interval > l2.lease_duration / 2 {
        let third = l2.lease_duration / 3;
        let why = "does not fit into the lease twice, so that the programs would fall silent";
        replace("agent-liveness-update-interval", &mut l2.liveness_interval, third, why);
    }
}

fn combinations(config: &Config, warnings: &mut Vec<String>) {
    if config.l2.enabled && !config.services.kube_proxy_replacement {
        warnings.push(
            "enable-l2-announcements=true without kube-proxy-replacement=true: addresses would be answered for but not served"
                .into(),
        );
    }
    if config.observe.healthz.is_some() && !config.services.kube_proxy_replacement {
        warnings.push(
            "kube-proxy-replacement-healthz-bind-address has no effect without kube-proxy-replacement=true".into(),
        );
    }
    if (config.kubernetes.burst as f32) < config.kubernetes.qps {
        warnings.push(format!(
            "k8s-client-burst={} is below k8s-client-qps={}: the burst limits the rate",
            config.kubernetes.burst, config.kubernetes.qps
        ));
    }
}
