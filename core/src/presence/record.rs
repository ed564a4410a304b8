//! What a node says about itself, in an annotation of its presence Lease.
//!
//! Annotations of one object may have 256 KiB together, and a node may own thousands of addresses: neighbours are
//! written as ranges.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smol_str::SmolStr;

use super::Link;
use crate::devices::Families;
use crate::objects::Lease;

/// The annotation.
pub const ANNOTATION: &str = "kinesin.io/presence";

/// It takes what is for a service out of the packets that others wrap it in.
pub const TAKES_IPIP: &str = "ipip";

/// It takes what is addressed to its backends and says which service it is for.
pub const TAKES_OPT: &str = "opt";

/// More addresses than any node announces; a record that lists more is not believed.
const MAX_CLAIMS: usize = 1 << 17;

/// A node's own words.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The node's name.
    #[serde(rename = "n")]
    pub node: SmolStr,
    /// Which run of the agent wrote this; differs after every start.
    #[serde(rename = "i", default, skip_serializing_if = "SmolStr::is_empty")]
    pub instance: SmolStr,
    /// When that run began, RFC 3339, for people.
    #[serde(rename = "s", default, skip_serializing_if = "SmolStr::is_empty")]
    pub since: SmolStr,
    /// Selected devices that can carry frames now.
    #[serde(rename = "d", default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<SmolStr>,
    /// Those of them that cannot answer for IPv4. Agents before this field can be asked for both: see ADR 0004.
    #[serde(rename = "x4", default, skip_serializing_if = "Vec::is_empty")]
    pub without_ipv4: Vec<SmolStr>,
    /// Those of them that cannot answer for IPv6.
    #[serde(rename = "x6", default, skip_serializing_if = "Vec::is_empty")]
    pub without_ipv6: Vec<SmolStr>,
    /// Links on which it takes packets that others hand on to it as they are; none while its programs are not ready.
    #[serde(rename = "l", default, skip_serializing_if = "Vec::is_empty")]
    pub links: Vec<Link>,
    /// In which other ways it takes packets that others hand on to it: [`TAKES_IPIP`], [`TAKES_OPT`].
    #[serde(rename = "t", default, skip_serializing_if = "Vec::is_empty")]
    pub takes: Vec<SmolStr>,
    /// Addresses that it answers for, sorted.
    #[serde(
        rename = "c",
        default,
        skip_serializing_if = "Vec::is_empty",
        serialize_with = "write_claims",
        deserialize_with = "read_claims"
    )]
    pub claims: Vec<IpAddr>,
    /// Nodes whose presence has run out in its eyes, with the last `renewTime` of each: so that a restarted agent does not
    /// take a dead node's last words for those of a living one.
    #[serde(rename = "g", default, skip_serializing_if = "BTreeMap::is_empty")]
    pub gone: BTreeMap<SmolStr, SmolStr>,
    /// Is going away: others should take over.
    #[serde(rename = "q", default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
}

/// Why a record could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The Lease has none.
    #[error("lease {lease}: annotation {ANNOTATION} is missing")]
    Missing {
        /// The Lease's name.
        lease: SmolStr,
    },
    /// It is the record of another node.
    #[error("lease {lease}: annotation {ANNOTATION} names node {node}; each node writes only its own lease")]
    Foreign {
        /// The Lease's name.
        lease: SmolStr,
        /// The node in the record.
        node: SmolStr,
    },
    /// It is not what [`Record::to_annotation`] writes.
    #[error("lease {lease}: annotation {ANNOTATION} is not readable")]
    Unreadable {
        /// The Lease's name.
        lease: SmolStr,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

impl Record {
    /// Its devices, with the IP versions that each can answer for.
    pub fn announcers(&self) -> impl Iterator<Item = (&SmolStr, Families)> {
        self.devices.iter().map(|name| {
            let families =
                Families { ipv4: !self.without_ipv4.contains(name), ipv6: !self.without_ipv6.contains(name) };
            (name, families)
        })
    }

    /// Replaces its devices.
    pub fn set_announcers(&mut self, devices: impl IntoIterator<Item = (SmolStr, Families)>) {
        let (devices, families): (Vec<_>, Vec<_>) = devices.into_iter().unzip();
        let without = |lacks: fn(&Families) -> bool| {
            devices.iter().zip(&families).filter(|(_, f)| lacks(f)).map(|(name, _)| SmolStr::clone(name)).collect()
        };
        (self.without_ipv4, self.without_ipv6) = (without(|f| !f.ipv4), without(|f| !f.ipv6));
        self.devices = devices;
    }

    /// The annotation's value.
    pub fn to_annotation(&self) -> String {
        serde_json::to_string(self).expect("invariant: a record has only strings, lists and a flag")
    }

    /// Reads the annotation of a presence Lease.
    pub fn from_lease(lease: &Lease) -> Result<Self, RecordError> {
        let name = || lease.metadata.name.clone();
        let text = lease.metadata.annotations.get(ANNOTATION).ok_or_else(|| RecordError::Missing { lease: name() })?;
        serde_json::from_str(text).map_err(|source| RecordError::Unreadable { lease: name(), source })
    }
}

fn next(ip: IpAddr) -> Option<IpAddr> {
    match ip {
        IpAddr::V4(v4) => u32::from(v4).checked_add(1).map(|n| IpAddr::V4(n.into())),
        IpAddr::V6(v6) => u128::from(v6).checked_add(1).map(|n| IpAddr::V6(n.into())),
    }
}

fn write_claims<S: Serializer>(claims: &[IpAddr], serializer: S) -> Result<S::Ok, S::Error> {
    let mut sorted = claims.to_vec();
    sorted.sort();
    sorted.dedup();
    let mut ranges: Vec<(IpAddr, IpAddr)> = Vec::new();
    for ip in sorted {
        match ranges.last_mut() {
            Some((_, last)) if next(*last) == Some(ip) => *last = ip,
            _ => ranges.push((ip, ip)),
        }
    }
    let text = |(first, last): &(IpAddr, IpAddr)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    serializer.collect_str(&ranges.iter().map(text).collect::<Vec<_>>().join(","))
}

fn read_claims<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpAddr>, D::Error> {
    use serde::de::Error;
    let text = String::deserialize(deserializer)?;
    let mut claims = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let parse =
            |text: &str| text.parse::<IpAddr>().map_err(|_| D::Error::custom(format!("\"{text}\" is no address")));
        let (first, last) = (parse(first)?, parse(last)?);
        let mut at = Some(first).filter(|first| first.is_ipv4() == last.is_ipv4());
        while let Some(ip) = at.filter(|ip| *ip <= last) {
            if claims.len() == MAX_CLAIMS {
                return Err(D::Error::custom(format!("more than {MAX_CLAIMS} addresses")));
            }
            claims.push(ip);
            at = next(ip);
        }
    }
    Ok(claims)
}
