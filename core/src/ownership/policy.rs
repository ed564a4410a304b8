//! `CiliumL2AnnouncementPolicy`, ready for use.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use regex::Regex;
use smol_str::SmolStr;

use crate::devices::Families;
use crate::lb_ipam::CLASS_L2;
use crate::objects::{Condition, L2Policy, ObjectKey, Service, ServiceType, StringMap};

/// Condition of a policy: `spec.nodeSelector` is invalid.
pub const CONDITION_BAD_NODE_SELECTOR: &str = "io.cilium/bad-node-selector";
/// Condition of a policy: `spec.serviceSelector` is invalid.
pub const CONDITION_BAD_SERVICE_SELECTOR: &str = "io.cilium/bad-service-selector";
/// Condition of a policy: one of `spec.interfaces` is not a regular expression.
pub const CONDITION_BAD_INTERFACE_REGEX: &str = "io.cilium/bad-interface-regex";

/// A device by name, with the IP versions that its node can answer for on it.
pub(super) type Announcer = (SmolStr, Families);

/// A policy and what it selects.
#[derive(Debug)]
pub(super) struct PolicyEntry {
    pub(super) policy: Arc<L2Policy>,
    interfaces: Vec<Regex>,
    /// By type of condition.
    problems: BTreeMap<&'static str, String>,
    /// Live nodes that it selects, with their devices that it selects; never empty lists.
    pub(super) nodes: BTreeMap<SmolStr, Vec<Announcer>>,
    /// Services with an address that it announces.
    pub(super) services: BTreeSet<ObjectKey>,
    pub(super) emitted: Option<Vec<Condition>>,
}

impl PolicyEntry {
    pub(super) fn read(policy: Arc<L2Policy>) -> Self {
        let mut problems = BTreeMap::new();
        let spec = &policy.spec;
        let selectors = [
            (CONDITION_BAD_NODE_SELECTOR, "nodeSelector", &spec.node_selector),
            (CONDITION_BAD_SERVICE_SELECTOR, "serviceSelector", &spec.service_selector),
        ];
        for (kind, field, selector) in selectors {
            if let Some(Err(error)) = selector.as_ref().map(|selector| selector.validate()) {
                problems.insert(kind, format!("spec.{field}.{error}"));
            }
        }
        let mut interfaces = Vec::new();
        for (index, pattern) in spec.interfaces.iter().enumerate() {
            match Regex::new(pattern) {
                Ok(regex) => interfaces.push(regex),
                Err(error) => {
                    // The error draws a picture over several lines; its last line says what is wrong.
                    let error = error.to_string();
                    let what = error.lines().last().unwrap_or_default().trim();
                    let text = format!("spec.interfaces[{index}]: \"{pattern}\" is not a regular expression: {what}");
                    problems.entry(CONDITION_BAD_INTERFACE_REGEX).or_insert(text);
                }
            }
        }
        let (nodes, services) = (BTreeMap::new(), BTreeSet::new());
        Self { policy, interfaces, problems, nodes, services, emitted: None }
    }

    pub(super) fn problems(&self) -> impl Iterator<Item = &String> {
        self.problems.values()
    }

    /// The given devices that it selects on a node with these labels. An invalid pattern selects nothing; the others count.
    pub(super) fn devices_on<'a>(
        &self,
        labels: Option<&StringMap>,
        devices: impl Iterator<Item = (&'a SmolStr, Families)>,
    ) -> Vec<Announcer> {
        let none = StringMap::new();
        let selected = !self.problems.contains_key(CONDITION_BAD_NODE_SELECTOR)
            && self.policy.spec.node_selector.as_ref().is_none_or(|s| s.matches_labels(labels.unwrap_or(&none)));
        let all = self.policy.spec.interfaces.is_empty();
        let fits = |name: &SmolStr| selected && (all || self.interfaces.iter().any(|regex| regex.is_match(name)));
        devices.filter(|(name, _)| fits(name)).map(|(name, families)| (name.clone(), families)).collect()
    }

    /// Whether a node can answer for an address where it is selected.
    pub(super) fn serves_on(&self, node: &SmolStr, addr: IpAddr) -> bool {
        self.nodes.get(node).is_some_and(|devices| devices.iter().any(|(_, families)| families.include(addr)))
    }

    /// The addresses of a Service that it announces.
    pub(super) fn addresses_of(&self, service: &Service) -> BTreeSet<IpAddr> {
        if self.problems.contains_key(CONDITION_BAD_SERVICE_SELECTOR) {
            return BTreeSet::new();
        }
        announced(service, &self.policy)
    }

    /// Conditions as they should be; good news only where there was bad before.
    pub(super) fn conditions(&self) -> Vec<Condition> {
        let there = &self.policy.status.conditions;
        let mut conditions = Vec::new();
        for kind in [CONDITION_BAD_NODE_SELECTOR, CONDITION_BAD_SERVICE_SELECTOR, CONDITION_BAD_INTERFACE_REGEX] {
            let problem = self.problems.get(kind);
            if problem.is_none() && !there.iter().any(|c| c.kind == kind) {
                continue;
            }
            let generation = self.policy.metadata.generation;
            conditions.push(Condition {
                kind: kind.into(),
                status: if problem.is_some() { "True" } else { "False" }.into(),
                reason: if problem.is_some() { "error" } else { "resolved" }.into(),
                message: problem.cloned().unwrap_or_default(),
                observed_generation: (generation != 0).then_some(generation),
                last_transition_time: String::new(),
            });
        }
        conditions
    }
}

/// The addresses of a Service that a policy announces, from whichever node. The selectors must be valid.
///
/// Services of a `loadBalancerClass` other than `io.cilium/l2-announcer` are somebody else's, whatever policies say.
pub fn announced(service: &Service, policy: &L2Policy) -> BTreeSet<IpAddr> {
    let spec = &service.spec;
    let selector = &policy.spec.service_selector;
    let ours = spec.load_balancer_class.as_deref().is_none_or(|class| class == CLASS_L2);
    if !ours || !selector.as_ref().is_none_or(|s| s.matches_service(&service.metadata)) {
        return BTreeSet::new();
    }
    let mut addresses = BTreeSet::new();
    if policy.spec.load_balancer_ips && spec.kind == ServiceType::LoadBalancer {
        let entries = service.status.load_balancer.ingress.iter();
        let programmed = entries.filter(|entry| entry.ip_mode.as_deref() != Some("Proxy"));
        addresses.extend(programmed.filter_map(|entry| entry.ip.parse::<IpAddr>().ok()));
    }
    if policy.spec.external_ips && spec.kind != ServiceType::ExternalName {
        addresses.extend(spec.external_ips.iter().filter_map(|ip| ip.parse::<IpAddr>().ok()));
    }
    addresses.into_iter().map(|ip| ip.to_canonical()).collect()
}
