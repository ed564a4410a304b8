//! A look at all that may need the host's stack.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use kinesin_core::host_routing::{LeadsTo, Seen, Through};

use crate::datapath::programs_at;
use crate::net::netfilter::StackUsers;
use crate::net::qdiscs;
use crate::world::Devices;

/// Of how many devices programs are asked for in one look, beside new devices: two questions each, and a node may have hundreds.
const TURN: usize = 32;

/// What looks, and what it knows from the last time.
#[derive(Default)]
pub(super) struct Sight {
    users: StackUsers,
    /// Ids of programs by device; all empty where the kernel has no tcx.
    programs: BTreeMap<u32, Vec<u32>>,
    no_tcx: bool,
    /// The device that was asked for last.
    last: u32,
}

impl Sight {
    /// Looks until it has found something that needs the stack; devices only while nothing does.
    pub(super) fn look(&mut self, devices: &Devices) -> Seen {
        let mut seen = self.users.look();
        if seen.needs_stack().is_some() {
            self.programs.clear();
            return seen;
        }
        match self.devices(devices) {
            Ok(devices) => seen.devices = devices,
            Err(error) => seen.unclear.push(format!("tc programs cannot be read: {error}")),
        }
        seen
    }

    fn devices(&mut self, devices: &Devices) -> io::Result<Vec<Through>> {
        let pods = devices.pods().map(|device| (device.ifindex, LeadsTo::Pod));
        let lan = devices.of_container().map(|device| (device.ifindex, LeadsTo::Lan));
        let through: BTreeMap<u32, LeadsTo> = pods.chain(lan).collect();
        if through.is_empty() {
            return Ok(Vec::new());
        }
        let filters = qdiscs::with_filters()?;
        self.programs.retain(|ifindex, _| through.contains_key(ifindex));
        let after = through.range(self.last.saturating_add(1)..).chain(&through);
        let turn: Vec<u32> = after.map(|(ifindex, _)| *ifindex).take(TURN.min(through.len())).collect();
        self.last = turn.last().copied().unwrap_or_default();
        let new = through.keys().copied().filter(|ifindex| !self.programs.contains_key(ifindex));
        let asked: BTreeSet<u32> = new.chain(turn).collect();
        for ifindex in asked {
            let found = if self.no_tcx { None } else { programs_at(ifindex)? };
            self.no_tcx = found.is_none();
            self.programs.insert(ifindex, found.unwrap_or_default());
        }
        let through = through.into_iter().map(|(ifindex, to)| Through {
            ifindex,
            to,
            filters: filters.contains(&ifindex),
            programs: self.programs.get(&ifindex).cloned().unwrap_or_default(),
        });
        Ok(through.collect())
    }
}
