//! What the loader has said in the log, so that each change of it is one line.

use std::collections::BTreeMap;

use crate::world::MapsHandle;

/// What was last said.
#[derive(Default)]
pub(super) struct Told {
    /// Which devices are accelerated, by name; of the others, why not.
    accelerated: BTreeMap<String, Option<String>>,
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
}
