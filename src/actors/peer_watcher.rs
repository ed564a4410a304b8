//! Finds the nodes that packets can be handed on to as they are (dispatches `l2`, `ipip` and `opt`).
//!
//! owns: the peers map, the questions to the neighbour table and the routing tables
//! hears: members, devices, nodes, a (re)loaded data path, the configuration, which way packets to pods take, the clock for
//! asking neighbours again
//! says: the peers level: which nodes are neighbours or reached by route, and why the others are not
//! restart story: judges anew from members and neighbour table; entries of the map that it knows nothing of stay while
//! their node exists, so that connections go on
//!
//! Deliberately absent: what makes a peer, which is decided in `kinesin_core::peers`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use kinesin_core::host_routing::HostRouting;
use kinesin_core::peers::{self, Beyond, Peer, State, Usage};
use kinesin_core::trace::RouteQuery;
use metrics::gauge;
use rtnetlink::packet_route::neighbour::NeighbourState;

use crate::actor::{Actor, Failure};
use crate::address::{Address, Label, Timer};
use crate::datapath::MapStore;
use crate::level::Follower;
use crate::net::Rtnl;
use crate::net::rtnl::Neighbour;
use crate::world::{Devices, LiveMembers, MapsHandle, World};

/// What the watcher hears.
pub enum PeerWatcherMsg {
    /// Members, devices, maps, configuration or the way to pods changed.
    Wake,
    /// Time to ask the neighbours again.
    Look,
}

impl Label for PeerWatcherMsg {
    fn label(&self) -> &'static str {
        match self {
            Self::Wake => "Wake",
            Self::Look => "Look",
        }
    }
}

/// How often neighbours are asked. The kernel sends a question only when the last answer is old (`base_reachable_time`).
const PERIOD: Duration = Duration::from_secs(2);
/// How soon after a question to somebody new an answer is looked for, and how often in a row.
const SOON: Duration = Duration::from_millis(100);
const EAGER_LOOKS: u32 = 20;

/// The actor.
pub struct PeerWatcher {
    world: World,
    me: Address<PeerWatcherMsg>,
    rtnl: Rtnl,
    followers: (Follower<LiveMembers>, Follower<Devices>, Follower<crate::config::Config>),
    host_routing: Follower<HostRouting>,
    maps: Follower<MapsHandle>,
    store: Option<Arc<dyn MapStore>>,
    /// Looks in a row that left somebody without an answer.
    eager: u32,
    timer: Option<Timer>,
}

impl Actor for PeerWatcher {
    type Msg = PeerWatcherMsg;
    type Args = World;

    async fn start(world: World, me: Address<PeerWatcherMsg>) -> Result<Self, Failure> {
        let wake = me.waker(|| PeerWatcherMsg::Wake);
        me.cast(PeerWatcherMsg::Look);
        Ok(Self {
            rtnl: Rtnl::open()?,
            followers: (
                world.members.follow(wake.clone()),
                world.devices.follow(wake.clone()),
                world.config.follow(wake.clone()),
            ),
            host_routing: world.host_routing.follow(wake.clone()),
            maps: world.maps.follow(wake),
            store: None,
            eager: 0,
            timer: None,
            me,
            world,
        })
    }

    async fn handle(&mut self, message: PeerWatcherMsg) -> Result<(), Failure> {
        let (members, devices, config) = &self.followers;
        let news = members.changed().is_some() | devices.changed().is_some() | config.changed().is_some();
        // It only wakes: what is written follows below.
        drop(self.host_routing.changed());
        if let Some(handle) = self.maps.changed() {
            self.store = Some(handle.tables.store.clone());
        }
        if news {
            self.eager = 0;
        }
        let peers = self.judge().await?;
        if let Some(peers) = peers {
            self.write(&peers)?;
            self.publish(peers);
        }
        if news || matches!(message, PeerWatcherMsg::Look) {
            let period = if (1..EAGER_LOOKS).contains(&self.eager) { SOON } else { PERIOD };
            self.timer = Some(self.me.cast_after(period, PeerWatcherMsg::Look));
        }
        Ok(())
    }
}

impl PeerWatcher {
    fn enabled(&self) -> bool {
        self.world.config().services.hands_on()
    }

    /// The peers as they are now, whom it asks to answer again; none before everybody is known.
    async fn judge(&mut self) -> Result<Option<Vec<Peer>>, Failure> {
        let (Some(live), Some(devices)) = (self.world.members.get(), self.world.devices.get()) else {
            return Ok(None);
        };
        if !live.settled {
            return Ok(None);
        }
        let devices: Vec<_> = devices.selected().collect();
        let mut beyond = Beyond { dispatch: self.world.config().services.beyond(), ..Beyond::default() };
        let judge = |table: &[Neighbour], beyond: &Beyond| {
            let answered: Vec<_> = table.iter().filter_map(answer).collect();
            peers::judge(&self.world.node, &devices, &live.members.records, &answered, beyond)
        };
        if !self.enabled() {
            return Ok(Some(judge(&[], &beyond)));
        }
        let table = self.rtnl.neighbours().await?;
        let mut peers = judge(&table, &beyond);
        let far = peers.iter().filter(|peer| matches!(peer.state, State::Routed(_)));
        for dst in far.flat_map(|peer| peers::destinations(&peer.links)) {
            if let Err(why) = self.rtnl.way_to(&RouteQuery { dst, src: None, ingress: None }, &[]).await? {
                beyond.refused.insert(dst, why);
            }
        }
        if !beyond.refused.is_empty() {
            peers = judge(&table, &beyond);
        }
        for way in peers.iter().filter_map(|peer| peer.way.as_ref()) {
            let entry = table.iter().find(|entry| entry.ifindex == way.ifindex && entry.address == way.address);
            // What somebody has entered by hand is not asked about, and a question would make it forgettable.
            let fixed = |entry: &Neighbour| matches!(entry.state, NeighbourState::Permanent | NeighbourState::Noarp);
            if !entry.is_some_and(fixed)
                && let Err(error) = self.rtnl.ask_neighbour(way.ifindex, way.address).await
            {
                tracing::debug!(address = %way.address, %error, "neighbour not asked");
            }
        }
        let unresolved = peers.iter().any(|peer| peer.state == State::Unresolved);
        self.eager = if unresolved { self.eager.saturating_add(1) } else { 0 };
        Ok(Some(peers))
    }

    /// Makes the map hold what it should, whoever has changed it.
    fn write(&self, peers: &[Peer]) -> Result<(), Failure> {
        let Some(store) = &self.store else { return Ok(()) };
        let held = store.read_peers()?;
        let nodes: Option<BTreeSet<u32>> = self
            .world
            .nodes
            .is_complete()
            .then(|| self.world.nodes.keys().iter().map(|key| peers::tag(&key.name)).collect());
        let known = |tag| nodes.as_ref().is_none_or(|nodes| nodes.contains(&tag));
        let routing = self.world.host_routing();
        let usage = Usage { new: self.enabled(), routing: &routing };
        let wanted = peers::entries(peers, usage, &held, known);
        let held: BTreeMap<_, _> = held.into_iter().collect();
        for (key, value) in wanted.iter().filter(|(key, value)| held.get(key) != Some(value)) {
            store.put_peer(key, value)?;
        }
        for key in held.keys().filter(|key| !wanted.contains_key(key)) {
            store.delete_peer(key)?;
        }
        Ok(())
    }

    fn publish(&self, peers: Vec<Peer>) {
        for label in State::LABELS {
            let count = peers.iter().filter(|peer| peer.state.label() == label).count();
            gauge!("kinesin_peers", "state" => label).set(count as f64);
        }
        if self.enabled() {
            let before = self.world.peers.get();
            let known = |node: &str| before.iter().flat_map(|b| b.iter()).find(|peer| peer.node == node);
            for peer in &peers {
                if known(&peer.node).is_none_or(|known| known.state != peer.state) {
                    tracing::info!(node = %peer.node, way = peer.state.text(), "way to a node's backends");
                }
            }
            let gone = |peer: &&Peer| !peers.iter().any(|now| now.node == peer.node);
            for peer in before.iter().flat_map(|before| before.iter()).filter(gone) {
                tracing::info!(node = %peer.node, way = "snat: its agent is gone", "way to a node's backends");
            }
        }
        self.world.peers.set(peers);
    }
}

/// An entry under which somebody answers, or has lately.
fn answer(entry: &Neighbour) -> Option<peers::Neighbour> {
    let valid = matches!(
        entry.state,
        NeighbourState::Reachable
            | NeighbourState::Stale
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Permanent
            | NeighbourState::Noarp
    );
    let mac = entry.mac.filter(|_| valid)?;
    Some(peers::Neighbour { ifindex: entry.ifindex, address: entry.address, mac })
}
