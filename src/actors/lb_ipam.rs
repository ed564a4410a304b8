//! Gives LoadBalancer Services their addresses, on the elected agent.
//!
//! owns: the allocator (which addresses are taken, by whom), and the custom resource definitions' registration
//! hears: leadership; changes of services and pools
//! says: orders to status_writer
//! restart story: imports every address that is in a Service's status before it allocates anything
//!
//! Deliberately absent: writing. An agent that loses its leadership takes its orders back and forgets the rest.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use kinesin_core::lb_ipam::{Allocator, CLASS_L2, Effect, Input};
use kinesin_core::objects::{Node, ObjectKey, Pool, Service};
use metrics::gauge;

use crate::actor::{Actor, Failure};
use crate::address::{Address, Label, Timer};
use crate::config::{Config, DefaultIpam};
use crate::level::Follower;
use crate::source::Source;
use crate::table::Subscription;
use crate::world::{Leadership, StatusKey, StatusOrder, StatusPatch, World};

/// What the allocator hears.
pub enum LbIpamMsg {
    /// Leadership, services, pools or the configuration changed.
    Wake,
    /// The custom resource definitions are registered, or could not be.
    Registered(Result<(), String>),
    /// Time to try the registration again.
    Register,
}

impl Label for LbIpamMsg {
    fn label(&self) -> &'static str {
        match self {
            Self::Wake => "Wake",
            Self::Registered(_) => "Registered",
            Self::Register => "Register",
        }
    }
}

/// Between attempts to register the definitions.
const REGISTER_AGAIN: Duration = Duration::from_secs(5);

/// The actor.
pub struct LbIpam {
    world: World,
    source: Arc<dyn Source>,
    me: Address<LbIpamMsg>,
    leadership: Follower<Leadership>,
    services: Subscription<ObjectKey, Service>,
    pools: Subscription<ObjectKey, Pool>,
    nodes: Subscription<ObjectKey, Node>,
    config: Follower<Config>,
    duty: Option<Duty>,
    serial: u64,
}

/// What exists while this agent is the elected one.
struct Duty {
    allocator: Allocator,
    config: kinesin_core::lb_ipam::Config,
    synced: bool,
    registration: Option<Timer>,
}

impl Actor for LbIpam {
    type Msg = LbIpamMsg;
    type Args = (World, Arc<dyn Source>);

    async fn start((world, source): Self::Args, me: Address<LbIpamMsg>) -> Result<Self, Failure> {
        let wake = me.waker(|| LbIpamMsg::Wake);
        // Serial numbers of an earlier instance must not look like ours.
        let serial = world.orders.rows().iter().map(|(_, order)| order.serial).max().unwrap_or(0);
        Ok(Self {
            leadership: world.leadership.follow(wake.clone()),
            services: world.services.subscribe(wake.clone()),
            pools: world.pools.subscribe(wake.clone()),
            nodes: world.nodes.subscribe(wake.clone()),
            config: world.config.follow(wake),
            duty: None,
            serial,
            world,
            source,
            me,
        })
    }

    async fn handle(&mut self, message: LbIpamMsg) -> Result<(), Failure> {
        match message {
            LbIpamMsg::Wake => self.wake(),
            LbIpamMsg::Register => self.register(),
            LbIpamMsg::Registered(Ok(())) => self.world.problems.clear("crds"),
            LbIpamMsg::Registered(Err(error)) => {
                self.world.problems.set("crds", vec![error]);
                if let Some(duty) = &mut self.duty {
                    duty.registration = Some(self.me.cast_after(REGISTER_AGAIN, LbIpamMsg::Register));
                }
            }
        }
        Ok(())
    }
}

impl LbIpam {
    fn wake(&mut self) {
        let restart = self.config.changed().is_some();
        let _ = self.leadership.changed();
        let config = self.world.config();
        let leading =
            config.lb_ipam.enabled && self.world.leadership.get().is_some_and(|leadership| leadership.leading);
        match (&self.duty, leading) {
            (None, true) => self.begin(&config),
            (Some(_), false) => self.end(),
            (Some(duty), true) if restart && duty.config != allocator_config(&config) => {
                self.end();
                self.begin(&config);
            }
            _ => {}
        }
        self.step();
    }

    fn begin(&mut self, config: &Config) {
        tracing::info!("allocating addresses");
        self.duty = Some(Duty {
            allocator: Allocator::new(allocator_config(config)),
            config: allocator_config(config),
            synced: false,
            registration: None,
        });
        self.services.mark_all();
        self.pools.mark_all();
        self.nodes.mark_all();
        if !config.kubernetes.skip_crd_creation {
            self.register();
        }
    }

    fn end(&mut self) {
        tracing::info!("no longer allocating addresses");
        self.duty = None;
        for (key, _) in self.world.orders.rows() {
            if !matches!(key, StatusKey::Policy(_)) {
                self.world.orders.remove(&key);
            }
        }
    }

    fn register(&mut self) {
        let (source, me) = (self.source.clone(), self.me.clone());
        tokio::spawn(async move {
            let result = source.register_kinds().await.map_err(|error| error.to_string());
            me.cast(LbIpamMsg::Registered(result));
        });
    }

    fn step(&mut self) {
        // Read before the changes are taken: rows that arrive later come with their own wake-up.
        let world = &self.world;
        let complete = world.services.is_complete() && world.pools.is_complete() && world.nodes.is_complete();
        let (pools, services, nodes) = (self.pools.take(), self.services.take(), self.nodes.take());
        let Some(duty) = &mut self.duty else { return };
        let mut effects = Vec::new();
        if !nodes.is_empty() {
            effects.extend(duty.allocator.step(Input::NodeAddresses(node_addresses(world))));
        }
        for (key, pool) in pools {
            effects.extend(duty.allocator.step(match pool {
                Some(pool) => Input::PoolUpserted(pool),
                None => Input::PoolRemoved(key),
            }));
        }
        for (key, service) in services {
            effects.extend(duty.allocator.step(match service {
                Some(service) => Input::ServiceUpserted(service),
                None => {
                    world.orders.remove(&StatusKey::Service(key.clone()));
                    Input::ServiceRemoved(key)
                }
            }));
        }
        if complete && !duty.synced {
            duty.synced = true;
            effects.extend(duty.allocator.step(Input::Synced));
        }
        effects.into_iter().for_each(|effect| self.perform(effect));
        self.publish_counts();
    }

    fn perform(&mut self, effect: Effect) {
        self.serial += 1;
        let serial = self.serial;
        let (key, status) = match effect {
            Effect::ServiceStatus { key, ingress, condition } => {
                let addresses = ingress.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
                let reason = condition.as_ref().map_or("", |condition| condition.reason.as_str());
                tracing::info!(service = %key, addresses, reason, "addresses decided");
                (StatusKey::Service(key), StatusPatch::Service { ingress, condition })
            }
            Effect::PoolStatus { name, conditions } => (StatusKey::Pool(name), StatusPatch::Conditions(conditions)),
        };
        self.world.orders.put(key, StatusOrder { serial, status });
    }

    fn publish_counts(&self) {
        let Some(duty) = &self.duty else { return };
        let stats = duty.allocator.stats();
        for pool in &stats.pools {
            let name = pool.name.to_string();
            gauge!("cilium_operator_lbipam_ips_available", "pool" => name.clone()).set(pool.available.as_f64());
            gauge!("cilium_operator_lbipam_ips_used", "pool" => name).set(pool.used.as_f64());
        }
        gauge!("cilium_operator_lbipam_conflicting_pools")
            .set(stats.pools.iter().filter(|pool| pool.conflicting).count() as f64);
        gauge!("cilium_operator_lbipam_services_matching").set(stats.services_matching as f64);
        gauge!("cilium_operator_lbipam_services_unsatisfied").set(stats.services_unsatisfied as f64);
    }
}

/// The Services that `default-lb-service-ipam` and the enabled features leave to LB-IPAM.
fn allocator_config(config: &Config) -> kinesin_core::lb_ipam::Config {
    let classes = if config.l2.enabled { vec![CLASS_L2.into()] } else { Vec::new() };
    kinesin_core::lb_ipam::Config {
        handle_classless: config.lb_ipam.default_for == DefaultIpam::LbIpam,
        classes,
        ipv4: config.families.ipv4,
        ipv6: config.families.ipv6,
    }
}

/// What no Service may be given.
fn node_addresses(world: &World) -> BTreeSet<IpAddr> {
    let rows = world.nodes.rows();
    let addresses = rows.iter().flat_map(|(_, node)| &node.status.addresses);
    addresses.filter_map(|entry| entry.address.parse().ok()).collect()
}
