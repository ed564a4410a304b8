//! Decides which way packets take to pods of this node: straight to their devices, or by the host's stack.
//!
//! owns: the questions to netfilter, IPsec and the hooks of devices
//! hears: devices, the configuration, which programs are ours, changes of nftables, the clock for what changes without a word
//! says: the host_routing level: which way, why, and through which devices not
//! restart story: looks anew; what was said last stays until then
//!
//! While the configuration says which way, it asks nobody and holds no timer.
//! Deliberately absent: what makes the stack necessary, which is decided in `kinesin_core::host_routing`.

mod sight;

use std::collections::BTreeSet;
use std::time::Duration;

use kinesin_core::host_routing::{HostRouting, Seen, decide};

use self::sight::Sight;
use crate::actor::{Actor, Failure};
use crate::address::{Address, Label, Timer};
use crate::config::Config;
use crate::level::Follower;
use crate::net::netfilter::RuleChanges;
use crate::net::sysctl;
use crate::world::{Devices, World};

/// What the watcher hears.
pub enum StackWatcherMsg {
    /// Devices, configuration or our programs changed.
    Wake,
    /// Rules of nftables changed.
    Rules,
    /// Time to look again.
    Look,
}

impl Label for StackWatcherMsg {
    fn label(&self) -> &'static str {
        match self {
            Self::Wake => "Wake",
            Self::Rules => "Rules",
            Self::Look => "Look",
        }
    }
}

/// How often it looks without a reason: iptables-legacy, IPsec and programs at devices say nothing when they change.
const PERIOD: Duration = Duration::from_secs(1);
/// After a change of nftables the next one is looked at this much later at the earliest.
const PAUSE: Duration = Duration::from_millis(20);

/// The actor.
pub struct StackWatcher {
    world: World,
    me: Address<StackWatcherMsg>,
    devices: Follower<Devices>,
    config: Follower<Config>,
    programs: Follower<BTreeSet<u32>>,
    /// While it is ours to find out.
    watch: Option<Watch>,
    /// What was last said in the log.
    told: Option<HostRouting>,
}

impl Actor for StackWatcher {
    type Msg = StackWatcherMsg;
    type Args = World;

    async fn start(world: World, me: Address<StackWatcherMsg>) -> Result<Self, Failure> {
        let wake = me.waker(|| StackWatcherMsg::Wake);
        let mut watcher = Self {
            devices: world.devices.follow(wake.clone()),
            config: world.config.follow(wake.clone()),
            programs: world.programs.follow(wake),
            watch: None,
            told: None,
            me,
            world,
        };
        // Before the loader writes the settings, if it can be said already.
        watcher.follow().await?;
        Ok(watcher)
    }

    async fn handle(&mut self, _: StackWatcherMsg) -> Result<(), Failure> {
        self.follow().await
    }
}

impl StackWatcher {
    /// Looks, where that is ours to do, and publishes what is decided; nothing before devices are known.
    async fn follow(&mut self) -> Result<(), Failure> {
        drop((self.devices.changed(), self.config.changed(), self.programs.changed()));
        let said = self.world.config().services.legacy_host_routing;
        let seen = if said.is_some() {
            self.watch = None;
            Seen::default()
        } else {
            let Some(devices) = self.world.devices.get() else { return Ok(()) };
            let watch = self.watch.get_or_insert_with(|| Watch::begin(self.me.clone()));
            let mut sight = std::mem::take(&mut watch.sight);
            // On a thread of its own: the kernel answers some of it only when nobody configures devices.
            let (sight, seen) = tokio::task::spawn_blocking(move || {
                let seen = sight.look(&devices);
                (sight, seen)
            })
            .await?;
            watch.sight = sight;
            let ours = self.world.programs.get().map(|ours| (*ours).clone()).unwrap_or_default();
            let seen = Seen { ours, ..seen };
            watch.timer = Some(self.me.cast_after(PERIOD, StackWatcherMsg::Look));
            seen
        };
        let routing = decide(said, &seen);
        self.tell(&routing);
        self.world.host_routing.set(routing);
        Ok(())
    }

    /// One line in the log for each change of the way.
    fn tell(&mut self, routing: &HostRouting) {
        let same = |told: &HostRouting| (told.straight, &told.why) == (routing.straight, &routing.why);
        let warned = self.told.as_ref().is_some_and(|told| told.straight && told.said);
        if !self.told.as_ref().is_some_and(same) {
            let way = if routing.straight { "straight to their devices" } else { "by the host's stack" };
            tracing::info!(way, why = routing.why, "packets to pods of this node");
        }
        if routing.straight && routing.said && !warned && sysctl::tracks_connections() {
            tracing::warn!(
                "netfilter tracks connections here and sees only part of each: where it masquerades or drops what is \
                 invalid, leave enable-host-legacy-routing empty"
            );
        }
        if self.told.as_ref() != Some(routing) {
            self.told = Some(routing.clone());
        }
    }
}

/// What is there only while the way is ours to find out.
struct Watch {
    sight: Sight,
    pump: Option<tokio::task::JoinHandle<()>>,
    timer: Option<Timer>,
}

impl Watch {
    /// Listens to nftables, where the kernel has it.
    fn begin(me: Address<StackWatcherMsg>) -> Self {
        let pump = match RuleChanges::open() {
            Ok(mut changes) => Some(tokio::spawn(async move {
                while changes.next().await.is_ok() {
                    me.cast(StackWatcherMsg::Rules);
                    tokio::time::sleep(PAUSE).await;
                }
            })),
            Err(error) => {
                tracing::debug!(%error, "changes of nftables are seen a second late");
                None
            }
        };
        Self { sight: Sight::default(), pump, timer: None }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(pump) = &self.pump {
            pump.abort();
        }
    }
}
