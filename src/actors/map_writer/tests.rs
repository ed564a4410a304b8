use std::net::{IpAddr, Ipv4Addr};

use kinesin_abi::{FrontendKind, proto};
use kinesin_core::services::Frontend;

use super::*;
use crate::config::{Inputs, load};
use crate::datapath::{MapSizes, MemoryMaps};
use crate::supervisor::{Backoff, Child, Policy, Strategy, Tree};

/// The machine is shared; what does not come within this never comes.
const LIMIT: Duration = Duration::from_secs(60);

fn world() -> World {
    let inputs = Inputs { hostname: "node".into(), ..Inputs::default() };
    let (config, _) = load(&inputs).unwrap();
    World::new("node".into(), config)
}

fn put(world: &World, number: u32) {
    let frontend = Frontend {
        addr: IpAddr::V4(Ipv4Addr::from(0x0a60_0000 + number)),
        port: 80,
        proto: proto::TCP,
        kind: FrontendKind::ClusterIp,
        port_name: "".into(),
        flags: 0,
        affinity: 0,
        external: None,
        internal: None,
    };
    let key = ServiceKey::new("default", format!("service-{number}"));
    world.compiled.put(key, Compiled { frontends: vec![frontend], ..Compiled::default() });
}

async fn start(world: &World) -> Tree {
    let world = world.clone();
    let writer = Child::actor::<MapWriter>(&Address::new("map_writer"), move || world.clone());
    let policy = Policy {
        strategy: Strategy::OneForOne,
        max_restarts: 0,
        within: LIMIT,
        backoff: Backoff { min: Duration::ZERO, max: Duration::ZERO },
        grace: LIMIT,
    };
    Tree::start(Child::supervisor("test", policy, vec![writer])).await.unwrap()
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn maps_are_filled_before_they_have_programs_and_services_work_with_both() {
    let world = world();
    let store: Arc<dyn MapStore> = Arc::new(MemoryMaps::new(MapSizes::default()));
    // More than are planned at a time.
    let services = PART as u32 * 2 + 1;
    (0..services).for_each(|number| put(&world, number));
    world.compiled.set_complete();
    let limits = Limits::default();
    world.tables.set(TablesHandle { generation: 1, store: store.clone(), limits: limits.clone() });
    let tree = start(&world).await;

    let frontends = || store.read().unwrap().frontends.len();
    until("the maps are filled", || frontends() == services as usize).await;
    // Once this one is there too, all that the first sync says has been said.
    put(&world, services);
    until("changes are written", || frontends() == services as usize + 1).await;
    assert!(!*world.programmed.get().unwrap());
    assert!(!world.unhealthy().is_empty());

    let other: Arc<dyn MapStore> = Arc::new(MemoryMaps::new(MapSizes::default()));
    world.maps.set(MapsHandle {
        tables: TablesHandle { generation: 1, store: store.clone(), limits: limits.clone() },
        hooks: Vec::new(),
        unaccelerated: Vec::new(),
    });
    until("they have programs", || *world.programmed.get().unwrap()).await;
    assert_eq!(world.unhealthy(), Vec::<String>::new());

    // A reload brings other maps, which are filled anew.
    world.tables.set(TablesHandle { generation: 2, store: other.clone(), limits });
    until("the other maps are filled", || other.read().unwrap().frontends.len() == services as usize + 1).await;
    tree.stop().await;
}
