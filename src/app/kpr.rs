//! What the agent says of kube-proxy's duties: the settings in force, and how far they reach.

use kinesin_core::peers::State;
use kinesin_core::services::Dispatch;

use crate::admin::views::KprView;
use crate::config::{Acceleration, Algorithm, LbMode};
use crate::net::sysctl;
use crate::world::World;

/// The mode, and how far it reaches.
fn mode(world: &World) -> String {
    let services = &world.config().services;
    let name = match services.mode {
        LbMode::Auto => "Auto",
        LbMode::Snat if services.mode_annotation => "SNAT, DSR by annotation",
        LbMode::Snat => return "SNAT".into(),
        LbMode::Dsr => "DSR",
        LbMode::Hybrid => "Hybrid",
    };
    let peers = world.peers.get();
    let peers: Vec<_> = peers.iter().flat_map(|peers| peers.iter()).collect();
    let near = peers.iter().filter(|peer| peer.state == State::Neighbour).count();
    let far = peers.iter().filter(|peer| matches!(peer.state, State::Routed(_))).count();
    let far = match services.beyond() {
        Dispatch::Snat | Dispatch::L2 => String::new(),
        dispatch => format!(", {} to {far}", dispatch.text().to_uppercase()),
    };
    format!("{name} (L2 to {near}{far} of {} other nodes, else SNAT)", peers.len())
}

/// Whether drivers forward too, and on which devices they do not.
fn acceleration(world: &World) -> String {
    let name = match world.config().services.acceleration {
        Acceleration::Disabled => return "Disabled".into(),
        Acceleration::Native => "Native",
        Acceleration::BestEffort => "Best-Effort",
    };
    let handle = world.maps.get();
    let devices: Vec<_> = handle
        .iter()
        .flat_map(|handle| handle.drivers())
        .map(|(device, why)| {
            why.map_or_else(|| format!("{device} in its driver"), |why| format!("{device} by tc: {why}"))
        })
        .collect();
    if devices.is_empty() { name.into() } else { format!("{name} ({})", devices.join("; ")) }
}

/// How many devices of pods packets go straight to; none where all of them pass the host's stack.
pub(super) fn direct_devices(world: &World) -> usize {
    let (devices, routing) = (world.devices.get(), world.host_routing());
    devices.iter().flat_map(|devices| devices.pods()).filter(|device| routing.goes_straight(device.ifindex)).count()
}

/// The devices by whose other end frames for neighbours leave, in a node that is a container.
fn across(world: &World) -> String {
    let (devices, routing) = (world.devices.get().filter(|_| world.config().services.hands_on()), world.host_routing());
    let straight = devices.iter().flat_map(|devices| devices.of_container());
    let names: Vec<_> =
        straight.filter(|device| routing.goes_straight(device.ifindex)).map(|device| device.name.as_str()).collect();
    if names.is_empty() { String::new() } else { format!("; to neighbours across {}", names.join(", ")) }
}

/// Whether packets to pods of this node pass the host's stack, and why, and how many devices they go straight to.
fn host_routing(world: &World) -> String {
    let routing = world.host_routing();
    if !routing.straight {
        return routing.why.as_ref().map_or_else(|| "Legacy".into(), |why| format!("Legacy ({why})"));
    }
    let direct = direct_devices(world);
    let devices = world.devices.get();
    let apart = devices.iter().flat_map(|devices| devices.pods()).count() - direct;
    let apart = if apart > 0 { format!(", {apart} by the stack: tc programs of others") } else { String::new() };
    let tracked = if routing.said && sysctl::tracks_connections() {
        "; netfilter tracks connections, and sees only part of each"
    } else {
        ""
    };
    format!("BPF ({direct} devices of pods{apart}{}{tracked})", across(world))
}

/// What `kinesin status` says of it.
pub(super) fn view(world: &World) -> KprView {
    let config = world.config();
    let devices = world.devices.get();
    let selected = devices.iter().flat_map(|devices| devices.selected());
    let range = config.services.node_port_range;
    let enabled = || "Enabled".to_owned();
    let services = [
        ("ClusterIP", enabled()),
        ("NodePort", format!("Enabled (Range: {}-{})", range.first, range.last)),
        ("LoadBalancer", enabled()),
        ("externalIPs", enabled()),
        ("HostPort", if config.services.kube_proxy_replacement { enabled() } else { "Disabled".into() }),
    ];
    KprView {
        enabled: config.services.kube_proxy_replacement,
        devices: selected
            .map(|device| {
                let addresses = device.addresses.iter().map(|net| net.addr().to_string());
                std::iter::once(device.name.to_string()).chain(addresses).collect::<Vec<_>>().join(" ")
            })
            .collect(),
        socket_lb: config.services.socket_lb(),
        mode: mode(world),
        backend_selection: match config.services.algorithm {
            Algorithm::Random => "Random".into(),
            Algorithm::Maglev => format!("Maglev (Table Size: {})", config.services.maglev_table_size),
        },
        session_affinity: true,
        xdp_acceleration: acceleration(world),
        host_routing: host_routing(world),
        services: services.into_iter().map(|(name, state)| (name.to_owned(), state)).collect(),
    }
}
