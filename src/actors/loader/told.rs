//! What the loader has said in the log, so that each change of it is one line.

use std::collections::BTreeMap;

use crate::config::Config;
use crate::net::sysctl;
use crate::world::MapsHandle;

/// What was last said.
#[derive(Default)]
pub(super) struct Told {
    /// Which devices are accelerated, by name; of the others, why not.
    accelerated: BTreeMap<String, Option<String>>,
    /// Whether packets to pods of this node go straight there.
    direct: bool,
}

impl Told {
    /// Which devices are accelerated and which are not, with one line in the log for each change.
    pub(super) fn acceleration(&mut self, maps: &MapsHandle) {
        let drivers = maps.drivers().map(|(device, why)| (device.to_owned(), why.map(str::to_owned)));
        let now: BTreeMap<String, Option<String>> = drivers.collect();
        for (device, why) in now.iter().filter(|(device, why)| self.accelerated.get(*device) != Some(why)) {
            match why {
                None => tracing::info!(%device, "accelerated: the driver runs our program"),
                Some(why) => tracing::warn!(%device, %why, "not accelerated: packets go by the tc programs"),
            }
        }
        for device in self.accelerated.keys().filter(|device| !now.contains_key(*device)) {
            tracing::info!(%device, "no longer accelerated");
        }
        self.accelerated = now;
    }

    /// Which way packets take to pods of this node, with one line in the log for each change.
    pub(super) fn host_routing(&mut self, config: &Config) {
        let direct = !config.services.legacy_host_routing;
        if direct != std::mem::replace(&mut self.direct, direct) {
            let way = if direct { "straight to their devices" } else { "by the host's stack" };
            tracing::info!(%way, "packets to pods of this node");
            if direct && sysctl::tracks_connections() {
                tracing::warn!(
                    "netfilter tracks connections here and sees only the pods' answers: where it masquerades them or \
                     drops what is invalid, set enable-host-legacy-routing=true"
                );
            }
        }
    }
}
