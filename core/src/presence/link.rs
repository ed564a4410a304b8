//! What a node says of its links, so that others can send it frames that they hand on as they are.

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::devices::{Device, mac_text};

/// A selected device of a node whose programs take what others hand on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Its MAC.
    #[serde(rename = "m", serialize_with = "write_mac", deserialize_with = "read_mac")]
    pub mac: [u8; 6],
    /// Its MTU, bytes; 0 where that is not known.
    #[serde(rename = "u", default)]
    pub mtu: u32,
    /// Its addresses, primary ones first, without link-local ones.
    #[serde(rename = "a", default)]
    pub addresses: Vec<IpNet>,
}

impl Link {
    /// Of a device; none where it has no MAC or cannot carry frames now.
    pub fn of(device: &Device) -> Option<Self> {
        let mac = device.mac.filter(|_| device.is_live() && !device.is_loopback)?;
        let addresses = device.addresses.iter().filter(|net| !is_link_local(net)).copied().collect();
        Some(Self { mac, mtu: device.mtu, addresses })
    }
}

/// Every segment has these networks, so they tell none from another.
fn is_link_local(net: &IpNet) -> bool {
    match net {
        IpNet::V4(net) => net.addr().is_link_local(),
        IpNet::V6(net) => net.addr().is_unicast_link_local(),
    }
}

fn write_mac<S: Serializer>(mac: &[u8; 6], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&mac_text(*mac))
}

fn read_mac<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 6], D::Error> {
    use serde::de::Error;
    let text = String::deserialize(deserializer)?;
    let bytes: Option<Vec<u8>> = text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    let mac = bytes.and_then(|bytes| bytes.try_into().ok());
    mac.ok_or_else(|| D::Error::custom(format!("\"{text}\" is no MAC")))
}
