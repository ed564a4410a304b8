//! Source ranges: which clients outside may use a Service.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::SourceRanges;
use super::problems::Problems;
use crate::objects::Service;

/// `allow` (the default), or `deny`: the ranges are those of the clients that are not served.
const POLICY_ANNOTATION: &str = "service.cilium.io/src-ranges-policy";

/// Nothing where the Service has no ranges and so serves everybody. What is no range is left out; when nothing is left of
/// the list, nobody is served, because whoever wrote a list meant to restrict.
pub(super) fn source_ranges(service: &Service, problems: &mut Problems) -> Option<SourceRanges> {
    let texts = &service.spec.load_balancer_source_ranges;
    if texts.is_empty() {
        return None;
    }
    let deny = match service.metadata.annotations.get(POLICY_ANNOTATION).map(|policy| policy.as_str()) {
        None | Some("allow") => false,
        Some("deny") => true,
        Some(other) => {
            problems.note(format!(
                "metadata.annotations[{POLICY_ANNOTATION}]: \"{other}\" is no policy, \"allow\" is used; use allow or deny"
            ));
            false
        }
    };
    let mut networks = BTreeSet::new();
    for text in texts {
        match text.trim().parse::<IpNet>() {
            Ok(network) => drop(networks.insert(canonical(network))),
            Err(_) => problems.note(format!(
                "spec.loadBalancerSourceRanges: \"{text}\" is not a network and is left out; write it like 192.0.2.0/24"
            )),
        }
    }
    if networks.is_empty() {
        problems.note(
            "spec.loadBalancerSourceRanges: holds no network, so no client outside is served; correct it, or remove it to serve everybody"
                .to_owned(),
        );
        if deny {
            networks.insert(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0).into());
            networks.insert(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0).into());
        }
    }
    Some(SourceRanges { deny, networks: networks.into_iter().collect() })
}

/// Without host bits, and IPv4 where it is IPv4 in mapped form.
fn canonical(network: IpNet) -> IpNet {
    let network = network.trunc();
    if let IpNet::V6(v6) = network
        && let IpAddr::V4(v4) = IpAddr::V6(v6.addr()).to_canonical()
        && let Some(bits) = v6.prefix_len().checked_sub(96)
        && let Ok(mapped) = Ipv4Net::new(v4, bits)
    {
        return mapped.into();
    }
    network
}
