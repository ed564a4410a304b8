//! Follows the node's links, addresses and routes.
//!
//! owns: the netlink subscription
//! hears: link, address and route notifications; the `devices` setting
//! says: the devices level
//! restart story: dumps everything from the kernel
//!
//! Deliberately absent: changing any link.

use std::sync::Arc;

use kinesin_core::devices::{self, Device};

use crate::actor::{Actor, Failure};
use crate::address::{Address, Label};
use crate::level::Follower;
use crate::net::links::LinkMonitor;
use crate::world::{Devices, World};

/// What the watcher hears.
pub enum LinkWatcherMsg {
    /// A new picture of all links.
    Changed(Arc<Vec<Device>>),
    /// The configuration changed.
    Wake,
    /// The netlink connection ended.
    Ended,
}

impl Label for LinkWatcherMsg {
    fn label(&self) -> &'static str {
        match self {
            Self::Changed(_) => "Changed",
            Self::Wake => "Wake",
            Self::Ended => "Ended",
        }
    }
}

/// The actor.
pub struct LinkWatcher {
    world: World,
    config: Follower<crate::config::Config>,
    links: Arc<Vec<Device>>,
    pump: tokio::task::JoinHandle<()>,
}

impl Actor for LinkWatcher {
    type Msg = LinkWatcherMsg;
    type Args = World;

    async fn start(world: World, me: Address<LinkWatcherMsg>) -> Result<Self, Failure> {
        let config = world.config.follow(me.waker(|| LinkWatcherMsg::Wake));
        let mut monitor = LinkMonitor::open().await?;
        let pump = tokio::spawn(async move {
            while let Some(links) = monitor.next().await {
                me.cast(LinkWatcherMsg::Changed(links));
            }
            me.cast(LinkWatcherMsg::Ended);
        });
        Ok(Self { world, config, links: Arc::default(), pump })
    }

    async fn handle(&mut self, message: LinkWatcherMsg) -> Result<(), Failure> {
        match message {
            LinkWatcherMsg::Changed(links) => self.links = links,
            LinkWatcherMsg::Wake => drop(self.config.changed()),
            LinkWatcherMsg::Ended => anyhow::bail!("the netlink connection ended"),
        }
        if !self.links.is_empty() {
            self.publish();
        }
        Ok(())
    }
}

impl LinkWatcher {
    fn publish(&self) {
        let filter = &self.world.config().devices;
        let selected: Vec<_> = devices::select(&self.links, filter).into_iter().map(|device| device.ifindex).collect();
        let before = self.world.devices.get();
        if before.as_ref().is_none_or(|before| before.selected != selected) {
            let names: Vec<_> =
                self.links.iter().filter(|d| selected.contains(&d.ifindex)).map(|d| d.name.as_str()).collect();
            tracing::info!(devices = names.join(" "), "devices selected");
            let none = || vec!["no network device is selected: set `devices` to the LAN's interface".to_owned()];
            self.world.problems.set("devices", if names.is_empty() { none() } else { Vec::new() });
        }
        self.world.devices.set(Devices { all: self.links.to_vec(), selected });
    }
}

impl Drop for LinkWatcher {
    fn drop(&mut self) {
        self.pump.abort();
    }
}
