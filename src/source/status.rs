//! Conditions as both sources write them: when a status changes, its `lastTransitionTime` does.

use std::net::IpAddr;

use kinesin_core::objects::{Condition, IngressEntry, ServiceStatus};

use super::IPAM_CONDITION;

/// Now, in the format and precision of `metav1.Time`.
pub(super) fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `wanted` with the transition time of its predecessor of the same type, or with `now` when the status is another.
pub(super) fn transition(known: &[Condition], wanted: &Condition, now: &str) -> Condition {
    let mut condition = wanted.clone();
    let before = known.iter().find(|c| c.kind == wanted.kind);
    condition.last_transition_time = match before {
        Some(before) if before.status == wanted.status && !before.last_transition_time.is_empty() => {
            before.last_transition_time.clone()
        }
        _ => now.to_owned(),
    };
    condition
}

/// `known` with each of `wanted` put in the place of its predecessor, or at the end.
pub(super) fn merge_conditions(known: &[Condition], wanted: &[Condition], now: &str) -> Vec<Condition> {
    let mut merged = known.to_vec();
    for condition in wanted {
        let condition = transition(known, condition, now);
        match merged.iter_mut().find(|c| c.kind == condition.kind) {
            Some(place) => *place = condition,
            None => merged.push(condition),
        }
    }
    merged
}

/// A Service's status after a write of LB-IPAM's outcome. Entries that stay keep their `ipMode`.
pub(super) fn service_status(
    known: &ServiceStatus,
    ingress: &[IpAddr],
    condition: Option<&Condition>,
    now: &str,
) -> ServiceStatus {
    let mut status = known.clone();
    status.load_balancer.ingress = ingress
        .iter()
        .map(|ip| {
            let before = known.load_balancer.ingress.iter().find(|e| e.ip.parse() == Ok(*ip));
            IngressEntry { ip: ip.to_string().into(), ip_mode: before.and_then(|e| e.ip_mode.clone()), hostname: None }
        })
        .collect();
    match condition {
        Some(condition) => {
            status.conditions = merge_conditions(&known.conditions, std::slice::from_ref(condition), now);
        }
        None => status.conditions.retain(|c| c.kind != IPAM_CONDITION),
    }
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition(kind: &str, status: &str, reason: &str, time: &str) -> Condition {
        Condition {
            kind: kind.into(),
            status: status.into(),
            reason: reason.into(),
            last_transition_time: time.into(),
            ..Condition::default()
        }
    }

    #[test]
    fn transition_time_moves_only_with_the_status() {
        let known = [condition("a", "False", "no_pool", "t0")];
        assert_eq!(transition(&known, &condition("a", "False", "out_of_ips", ""), "t1").last_transition_time, "t0");
        assert_eq!(transition(&known, &condition("a", "True", "satisfied", ""), "t1").last_transition_time, "t1");
        assert_eq!(transition(&known, &condition("b", "False", "x", ""), "t1").last_transition_time, "t1");
    }

    #[test]
    fn foreign_conditions_and_ip_modes_stay_while_hostnames_go() {
        let known: ServiceStatus = serde_json::from_value(serde_json::json!({
            "loadBalancer": {"ingress": [{"ip": "10.0.0.1", "ipMode": "Proxy"}, {"hostname": "elsewhere"}]},
            "conditions": [{"type": "other", "status": "True", "reason": "r", "message": "m"},
                           {"type": IPAM_CONDITION, "status": "True", "reason": "satisfied", "message": ""}],
        }))
        .unwrap();
        let addresses = ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let status = service_status(&known, &addresses, None, "t1");
        let ingress = &status.load_balancer.ingress;
        assert_eq!(ingress.len(), 2);
        assert_eq!((ingress[0].ip.as_str(), ingress[0].ip_mode.as_deref()), ("10.0.0.1", Some("Proxy")));
        assert_eq!((ingress[1].ip.as_str(), ingress[1].ip_mode.as_deref()), ("fd00::1", None));
        assert_eq!(status.conditions.iter().map(|c| c.kind.as_str()).collect::<Vec<_>>(), ["other"]);
    }
}
