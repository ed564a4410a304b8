//! Makes the programs answer for this node's addresses, and tells the LAN.
//!
//! owns: the l2 map, the sign of life in the settings, the sockets that announce, the memberships in multicast groups of
//! those who ask for IPv6 addresses
//! hears: what vip_owner decided, a (re)loaded data path, its heartbeat
//! says: gratuitous ARP and unsolicited neighbour advertisements on the wire
//! restart story: reads the l2 map back; removes nothing before vip_owner has decided once; joins the groups anew
//!
//! The programs answer only while the sign of life is fresh: an agent that hangs or dies falls silent by itself when its
//! presence runs out for the others.
//! Deliberately absent: deciding who answers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use kinesin_abi::{Addr, L2Key};
use metrics::{counter, gauge};

use crate::actor::{Actor, Failure};
use crate::address::{Address, Label, Timer};
use crate::clock;
use crate::datapath::{MapStore, update_settings};
use crate::level::Follower;
use crate::net::groups::Groups;
use crate::net::{garp, na};
use crate::table::Subscription;
use crate::world::{MapsHandle, World};

/// What the responder hears.
pub enum ArpResponderMsg {
    /// Answered addresses changed, or the data path was loaded.
    Wake,
    /// Time for a sign of life.
    Beat,
}

impl Label for ArpResponderMsg {
    fn label(&self) -> &'static str {
        match self {
            Self::Wake => "Wake",
            Self::Beat => "Beat",
        }
    }
}

/// The actor.
pub struct ArpResponder {
    world: World,
    me: Address<ArpResponderMsg>,
    answered: Subscription<(IpAddr, u32), u64>,
    maps: Follower<MapsHandle>,
    store: Option<Arc<dyn MapStore>>,
    /// What the l2 map holds.
    programmed: BTreeSet<(IpAddr, u32)>,
    /// Announcement number last sent for an address and device.
    announced: BTreeMap<(IpAddr, u32), u64>,
    /// Where those are heard who ask for our IPv6 addresses.
    groups: Groups,
    /// Addresses whose group could not be joined, and why.
    deaf: BTreeMap<(IpAddr, u32), String>,
    beat: Option<Timer>,
}

impl Actor for ArpResponder {
    type Msg = ArpResponderMsg;
    type Args = World;

    async fn start(world: World, me: Address<ArpResponderMsg>) -> Result<Self, Failure> {
        let wake = me.waker(|| ArpResponderMsg::Wake);
        me.cast(ArpResponderMsg::Beat);
        Ok(Self {
            answered: world.answered.subscribe(wake.clone()),
            maps: world.maps.follow(wake),
            store: None,
            programmed: BTreeSet::new(),
            announced: BTreeMap::new(),
            groups: Groups::default(),
            deaf: BTreeMap::new(),
            beat: None,
            me,
            world,
        })
    }

    async fn handle(&mut self, message: ArpResponderMsg) -> Result<(), Failure> {
        if let Some(handle) = self.maps.changed() {
            let entries = handle.tables.store.read_l2()?;
            self.programmed = entries.iter().map(|(key, _)| (IpAddr::from(key.addr), key.ifindex)).collect();
            self.store = Some(handle.tables.store.clone());
            self.answered.mark_all();
        }
        let Some(store) = self.store.clone() else {
            self.beat = Some(self.me.cast_after(self.world.config().l2.liveness_interval, ArpResponderMsg::Beat));
            return Ok(());
        };
        // What is no longer to be answered goes before a sign of life revives it.
        self.sync(&*store)?;
        if let ArpResponderMsg::Beat = message {
            self.beat(&*store)?;
            self.sync(&*store)?;
        }
        Ok(())
    }
}

impl ArpResponder {
    /// Refreshes the sign of life, and looks whether somebody removed what should be answered.
    fn beat(&mut self, store: &dyn MapStore) -> Result<(), Failure> {
        let config = self.world.config();
        // Presence is renewed every third of the lease, so that the last renewal of an agent that dies may be that old: the
        // others take over two thirds after its death at the earliest, and nobody else may answer by then.
        let alive_at = clock::monotonic_nanos();
        let alive_for = match self.is_alone() {
            true => u64::MAX,
            false => u64::try_from((config.l2.lease_duration * 2 / 3).as_nanos()).unwrap_or(u64::MAX),
        };
        // Programs that have fallen silent may hold addresses that another node has taken over: they stay silent until
        // vip_owner has decided (R53). Those that still answer go on.
        let decided = self.answered.table().is_complete();
        update_settings(store, |settings| {
            let silent = alive_at.saturating_sub(settings.alive_at) > settings.alive_for;
            if decided || !silent {
                (settings.alive_at, settings.alive_for) = (alive_at, alive_for);
            }
        })?;
        for key in self.deaf.keys().copied().collect::<Vec<_>>() {
            self.listen(key);
        }
        let entries = store.read_l2()?;
        let replies: u64 = entries.iter().map(|(_, value)| value.responses_sent).sum();
        gauge!("kinesin_l2_replies").set(replies as f64);
        let held: BTreeSet<_> = entries.iter().map(|(key, _)| (IpAddr::from(key.addr), key.ifindex)).collect();
        if held != self.programmed {
            tracing::warn!(held = held.len(), expected = self.programmed.len(), "l2 map differed: repaired");
            counter!("kinesin_map_repairs_total").increment(1);
            self.programmed = held;
            self.answered.mark_all();
        }
        self.beat = Some(self.me.cast_after(config.l2.liveness_interval, ArpResponderMsg::Beat));
        Ok(())
    }

    /// Nobody could take over: a cluster of one node never falls silent.
    fn is_alone(&self) -> bool {
        let others =
            |live: &crate::world::LiveMembers| live.members.records.keys().any(|node| *node != self.world.node);
        self.world.nodes.is_complete()
            && self.world.nodes.len() <= 1
            && self.world.members.get().is_none_or(|live| !others(&live))
    }

    fn sync(&mut self, store: &dyn MapStore) -> Result<(), Failure> {
        // Read before the changes are taken: rows that arrive later come with their own wake-up.
        let complete = self.answered.table().is_complete();
        for (key, announcement) in self.answered.take() {
            match announcement {
                Some(announcement) => self.answer(store, key, *announcement)?,
                None => self.fall_silent(store, key)?,
            }
        }
        if complete {
            let wanted: BTreeSet<_> = self.answered.table().keys().into_iter().collect();
            for key in self.programmed.difference(&wanted).copied().collect::<Vec<_>>() {
                self.fall_silent(store, key)?;
            }
        }
        gauge!("kinesin_l2_answered").set(self.programmed.len() as f64);
        Ok(())
    }

    fn answer(&mut self, store: &dyn MapStore, key: (IpAddr, u32), announcement: u64) -> Result<(), Failure> {
        let (ip, ifindex) = key;
        if !self.programmed.contains(&key) {
            store.put_l2(L2Key { addr: Addr::from(ip), ifindex })?;
            self.programmed.insert(key);
            tracing::info!(address = %ip, device = self.name_of(ifindex), "answering");
        }
        self.listen(key);
        if self.announced.insert(key, announcement) != Some(announcement) && announcement > 0 {
            self.announce(ip, ifindex);
        }
        Ok(())
    }

    fn fall_silent(&mut self, store: &dyn MapStore, key: (IpAddr, u32)) -> Result<(), Failure> {
        let (ip, ifindex) = key;
        self.announced.remove(&key);
        if let IpAddr::V6(v6) = ip {
            self.groups.leave(ifindex, v6);
            self.set_deaf(key, None);
        }
        if self.programmed.contains(&key) {
            store.delete_l2(&L2Key { addr: Addr::from(ip), ifindex })?;
            self.programmed.remove(&key);
            tracing::info!(address = %ip, device = self.name_of(ifindex), "no longer answering");
        }
        Ok(())
    }

    /// Joins the group that those who ask for an IPv6 address send to. Without it the programs still answer what comes in
    /// by chance: a problem, but no failure.
    fn listen(&mut self, key: (IpAddr, u32)) {
        let (IpAddr::V6(v6), ifindex) = key else { return };
        let joined = self.groups.join(ifindex, v6);
        self.set_deaf(key, joined.err().map(|error| format!("{:#}", anyhow::Error::from(error))));
    }

    fn set_deaf(&mut self, key: (IpAddr, u32), error: Option<String>) {
        let changed = match error {
            Some(error) => {
                let (ip, device) = (key.0, self.name_of(key.1));
                let text = format!("{ip} on {device} may not be found by neighbours: {error}");
                self.deaf.insert(key, text.clone()).is_none_or(|before| before != text)
            }
            None => self.deaf.remove(&key).is_some(),
        };
        if changed {
            self.world.problems.set("multicast", self.deaf.values().cloned().collect());
        }
    }

    /// A lost announcement is no failure: it is repeated, and requests are answered anyway.
    fn announce(&self, ip: IpAddr, ifindex: u32) {
        let devices = self.world.devices.get();
        let Some(device) = devices.as_ref().and_then(|devices| devices.by_index(ifindex)) else {
            return;
        };
        let sent = match ip {
            IpAddr::V4(v4) => garp::send(ifindex, device.mac, v4),
            IpAddr::V6(v6) => na::send(ifindex, device.mac, v6),
        };
        let outcome = match sent {
            Ok(()) => "success",
            Err(error) => {
                tracing::warn!(address = %ip, device = %device.name, %error, "address not announced");
                "fail"
            }
        };
        counter!("kinesin_l2_announcements_total", "outcome" => outcome).increment(1);
    }

    fn name_of(&self, ifindex: u32) -> String {
        let devices = self.world.devices.get();
        let device = devices.as_ref().and_then(|devices| devices.by_index(ifindex));
        device.map_or_else(|| format!("if{ifindex}"), |device| device.name.to_string())
    }
}
