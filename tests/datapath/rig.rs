//! A node to test on: namespaces, a LAN device, routes, loaded programs, and a few services.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use aya::programs::{SchedClassifier, Xdp};
use aya::{TestRun, TestRunOptions};
use kinesin::datapath::{Datapath, KernelMaps, LoadOptions, MapSizes, MapStore, ensure_bpffs};
use kinesin_abi::{
    Addr, BACKEND_LOCAL, Backend, BackendState, Be16, DEVICE_ETHERNET, DeviceValue, Direction, DropReason, FrontendKey,
    FrontendKind, FrontendValue, MAGLEV_TABLE_SIZE, SETTING_ANSWER_PING, SETTING_FOLLOW_FRAGMENTS4,
    SETTING_FOLLOW_FRAGMENTS6, SETTING_REJECT_NO_BACKEND, SOURCE_RANGE_BITS, SetRef, Settings, SourceRange,
    SourceRangeKey, Timeouts, frontend_flags, proto,
};
use kinesin_core::plan::Op;
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};

/// Codes of tc hooks.
pub(crate) const NEXT: i32 = -1;
pub(crate) const SHOT: i32 = 2;
pub(crate) const REDIRECT: i32 = 7;

pub(crate) const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 10);
pub(crate) const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x10];
pub(crate) const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 50);
pub(crate) const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x50];
pub(crate) const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 100);
pub(crate) const CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
pub(crate) const LOCAL_POD: Ipv4Addr = Ipv4Addr::new(10, 42, 1, 5);
pub(crate) const REMOTE_POD: Ipv4Addr = Ipv4Addr::new(10, 42, 2, 5);
pub(crate) const LAN: &str = "lan0";

/// The same of IPv6.
pub(crate) const NODE6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 0x10);
pub(crate) const CLIENT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 0x50);
pub(crate) const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, 0x100);
pub(crate) const CLUSTER_IP6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 1);
pub(crate) const LOCAL_POD6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x42, 1, 0, 0, 0, 0, 5);
pub(crate) const REMOTE_POD6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x42, 2, 0, 0, 0, 0, 5);
const ROUTELESS_POD6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x42, 9, 0, 0, 0, 0, 5);

/// Ports of [`VIP`], by what is behind them.
pub(crate) const TO_LOCAL: u16 = 80;
pub(crate) const TO_REMOTE: u16 = 81;
pub(crate) const TO_NOBODY: u16 = 82;
pub(crate) const TO_ROUTELESS: u16 = 83;
pub(crate) const TO_MAGLEV: u16 = 84;

/// Runs a test on a thread with a network and a mount namespace of its own.
pub(crate) fn isolated(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("root may unshare");
        nix::mount::mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
            .expect("mounts become private");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs iproute2.
pub(crate) fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn ifindex(name: &str) -> u32 {
    nix::net::if_::if_nametoindex(name).expect("the device is there")
}

/// A bpf filesystem in a directory of its own, visible to this thread only.
pub(crate) struct BpfRoot {
    dir: tempfile::TempDir,
}

impl BpfRoot {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        ensure_bpffs(dir.path()).expect("root may mount bpf");
        Self { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for BpfRoot {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.dir.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Sizes that load fast.
pub(crate) fn small() -> MapSizes {
    MapSizes {
        frontends: 1024,
        slots: 4096,
        backends: 1024,
        maglev: 64,
        flows: 4096,
        fragments: 64,
        transient: 4096,
        sockets: 1024,
        affinity: 1024,
        ranges: 1024,
        l2: 64,
        devices: 16,
        peers: 16,
    }
}

pub(crate) fn options(root: &Path) -> LoadOptions {
    LoadOptions { max_entries: small(), ..LoadOptions::new(root) }
}

/// [`options`] that serve both families.
pub(crate) fn dual(root: &Path) -> LoadOptions {
    LoadOptions { ipv6: true, ..options(root) }
}

/// A pair of devices, one of which is the node's leg on the LAN, and the routes of a node with two neighbours.
pub(crate) fn network() {
    ip("link set lo up");
    ip("link add lan0 address 02:00:00:00:00:10 type veth peer name lan1 address 02:00:00:00:00:ff");
    ip("link set lan0 up");
    ip("link set lan1 up");
    ip("addr add 192.168.1.10/24 dev lan0");
    ip("neigh add 192.168.1.50 lladdr 02:00:00:00:00:50 dev lan0");
    ip("neigh add 192.168.1.11 lladdr 02:00:00:00:00:11 dev lan0");
    ip("route add 10.42.2.0/24 via 192.168.1.11");
    ip("route add unreachable 10.42.9.0/24");
    ip("route add default via 192.168.1.11");
    ip("addr add fd00:1::10/64 dev lan0 nodad");
    ip("neigh add fd00:1::50 lladdr 02:00:00:00:00:50 dev lan0");
    ip("neigh add fd00:1::11 lladdr 02:00:00:00:00:11 dev lan0");
    ip("route add fd00:42:2::/48 via fd00:1::11");
    ip("route add unreachable fd00:42:9::/48");
    ip("route add default via fd00:1::11");
    forwarding(true);
}

pub(crate) fn forwarding(on: bool) {
    for sysctl in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        fs::write(format!("/proc/sys/net/{sysctl}"), if on { "1" } else { "0" }).expect("root may set sysctls");
    }
}

pub(crate) fn now() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("the clock is there");
    time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
}

pub(crate) fn settings() -> Settings {
    Settings {
        alive_at: now(),
        alive_for: 60_000_000_000,
        flags: SETTING_REJECT_NO_BACKEND | SETTING_ANSWER_PING | SETTING_FOLLOW_FRAGMENTS4 | SETTING_FOLLOW_FRAGMENTS6,
        snat_min: 61_000,
        snat_max: 65_000,
        maglev_seed: 7,
        timeouts: Timeouts::DEFAULT,
        node_port_min: 30_000,
        node_port_max: 32_767,
        pad: 0,
    }
}

pub(crate) fn frontend(addr: impl Into<Addr>, port: u16, protocol: u8) -> FrontendKey {
    FrontendKey { addr: addr.into(), port: Be16::new(port), proto: protocol, pad: 0 }
}

pub(crate) fn backend(addr: impl Into<Addr>, port: u16, protocol: u8, local: bool) -> Backend {
    Backend {
        addr: addr.into(),
        port: Be16::new(port),
        proto: protocol,
        state: BackendState::Active as u8,
        flags: if local { BACKEND_LOCAL } else { 0 },
    }
}

/// A frontend value with the same set for both scopes.
pub(crate) fn value(kind: FrontendKind, flags: u32, base: u32, count: u32) -> FrontendValue {
    let set = SetRef { base, count };
    FrontendValue { flags: kind as u32 | flags, service: 1, affinity: 0, external: set, internal: set }
}

/// Id of the backends by transport: 1.. for TCP, 11.. for UDP.
pub(crate) const LOCAL_ID: u32 = 1;
pub(crate) const REMOTE_ID: u32 = 2;
pub(crate) const ROUTELESS_ID: u32 = 3;

/// Services of the rig: for TCP and UDP, ports of [`VIP`] as named above, and a ClusterIP at 80.
pub(crate) fn services() -> Vec<Op> {
    let routeless = Ipv4Addr::new(10, 42, 9, 5);
    let mut ops = services_of(VIP.into(), CLUSTER_IP.into(), [LOCAL_POD, REMOTE_POD, routeless].map(IpAddr::from), 0);
    // Of a service that the rig does not have.
    let range = SourceRange { service: 99, list: 0, addr: Ipv4Addr::UNSPECIFIED.into() };
    ops.push(Op::PutSourceRange(SourceRangeKey { prefix_len: SOURCE_RANGE_BITS + 96, range }));
    ops
}

/// What is added to the id of a backend for that of its sibling of IPv6.
pub(crate) const SIX: u32 = 20;

/// The same services of IPv6, at [`VIP6`] and [`CLUSTER_IP6`].
pub(crate) fn services6() -> Vec<Op> {
    let pods = [LOCAL_POD6, REMOTE_POD6, ROUTELESS_POD6].map(IpAddr::from);
    services_of(VIP6.into(), CLUSTER_IP6.into(), pods, SIX)
}

fn services_of(vip: IpAddr, cluster_ip: IpAddr, pods: [IpAddr; 3], base: u32) -> Vec<Op> {
    let mut ops = Vec::new();
    for (protocol, first) in [(proto::TCP, base), (proto::UDP, base + 10)] {
        let pods = pods.into_iter().zip([true, false, false]);
        for (id, (addr, local)) in (first + 1..).zip(pods) {
            ops.push(Op::Backend(id, backend(addr, 8080, protocol, local)));
            // Slot 0 stays empty, so that a wrong base is seen.
            ops.push(Op::Slot(id, id));
        }
        let at_vip = |port, base, count, extra| {
            let flags = frontend_flags::ROUTABLE | extra;
            Op::PutFrontend(frontend(vip, port, protocol), value(FrontendKind::LoadBalancer, flags, base, count))
        };
        ops.push(at_vip(TO_LOCAL, first + LOCAL_ID, 1, 0));
        ops.push(at_vip(TO_REMOTE, first + REMOTE_ID, 1, 0));
        ops.push(at_vip(TO_NOBODY, 0, 0, 0));
        ops.push(at_vip(TO_ROUTELESS, first + ROUTELESS_ID, 1, 0));
        ops.push(at_vip(TO_MAGLEV, first + LOCAL_ID, 2, frontend_flags::MAGLEV));
        let table: Arc<[u32]> = (0..MAGLEV_TABLE_SIZE).map(|i| first + 1 + i % 2).collect();
        ops.push(Op::PutMaglev(first + LOCAL_ID, table));
        ops.push(Op::PutFrontend(
            frontend(cluster_ip, 80, protocol),
            value(FrontendKind::ClusterIp, 0, first + LOCAL_ID, 1),
        ));
    }
    for (addr, reach) in [(vip, frontend_flags::ROUTABLE), (cluster_ip, 0)] {
        let wildcard = value(FrontendKind::ClusterIp, frontend_flags::WILDCARD | reach, 0, 0);
        ops.push(Op::PutFrontend(frontend(addr, 0, proto::ANY), wildcard));
    }
    ops
}

/// A loaded node.
pub(crate) struct Rig {
    pub(crate) datapath: Datapath,
    pub(crate) maps: Arc<KernelMaps>,
    pub(crate) lan: u32,
    /// Unmounted last.
    root: BpfRoot,
}

impl Rig {
    /// Network, programs, services; nothing attached.
    pub(crate) fn new() -> Self {
        Self::with(small())
    }

    /// A node that serves both families.
    pub(crate) fn dual() -> Self {
        let rig = Self::new();
        rig.maps.apply(&services6()).expect("services");
        rig
    }

    pub(crate) fn with(sizes: MapSizes) -> Self {
        network();
        let root = BpfRoot::new();
        let options = LoadOptions { max_entries: sizes, ..LoadOptions::new(root.path()) };
        let datapath = Datapath::load(&options).expect("the maps are made");
        let refused: Vec<_> = datapath.hooks().into_iter().filter_map(|hook| hook.error).collect();
        assert!(refused.is_empty(), "{refused:#?}");
        let maps = datapath.kernel_maps();
        let lan = ifindex(LAN);
        let rig = Self { datapath, maps, lan, root };
        rig.maps.write_settings(&settings()).expect("settings");
        rig.maps.put_device(lan, &device()).expect("device");
        rig.maps.apply(&services()).expect("services");
        rig
    }

    /// The next agent's programs, with Maglev tables of another size.
    pub(crate) fn reload(&mut self, maglev_size: u32) {
        let options = LoadOptions { maglev_size, ..options(self.root()) };
        self.datapath = Datapath::load(&options).expect("the maps are made");
        self.maps = self.datapath.kernel_maps();
    }

    /// Where its maps and links are pinned.
    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    /// Runs a program on a packet as if it came in by, or went out of, the LAN device.
    pub(crate) fn run(&mut self, program: &str, packet: &[u8]) -> (i32, Vec<u8>) {
        let lan = self.lan;
        self.run_on(program, packet, lan)
    }

    pub(crate) fn run_on(&mut self, program: &str, packet: &[u8], ifindex: u32) -> (i32, Vec<u8>) {
        let program: &mut SchedClassifier =
            self.datapath.ebpf_mut().program_mut(program).expect("in the object").try_into().expect("a classifier");
        if program.fd().is_err() {
            program.load().expect("the kernel takes it");
        }
        // `struct __sk_buff` up to its eleventh word, ifindex.
        let mut context = [0u8; 44];
        context[40..].copy_from_slice(&ifindex.to_ne_bytes());
        let mut out = vec![0; 4096];
        let result = program
            .test_run(TestRunOptions {
                data_in: Some(packet),
                data_out: Some(&mut out),
                ctx_in: Some(&context),
                ..TestRunOptions::new()
            })
            .expect("the kernel runs it");
        out.truncate(result.data_size_out as usize);
        (result.return_value as i32, out)
    }

    /// Runs the XDP program on a frame as if the LAN device's driver had it. The device must run it already.
    pub(crate) fn driver(&mut self, frame: &[u8]) -> (u32, Vec<u8>) {
        let program = self.datapath.ebpf_mut().program_mut("cil_xdp_entry").expect("in the object");
        let program: &mut Xdp = program.try_into().expect("an XDP program");
        // `struct xdp_md`: start and end of the data, metadata, device, queue, egress device.
        let words = [0, frame.len() as u32, 0, self.lan, 0, 0];
        let context: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
        let mut out = vec![0; 4096];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let result = program.test_run(options).expect("the kernel runs it");
        out.truncate(result.data_size_out as usize);
        (result.return_value, out)
    }

    pub(crate) fn ingress(&mut self, packet: &[u8]) -> (i32, Vec<u8>) {
        self.run("cil_from_netdev", packet)
    }

    pub(crate) fn egress(&mut self, packet: &[u8]) -> (i32, Vec<u8>) {
        self.run("cil_to_netdev", packet)
    }

    pub(crate) fn ingress6(&mut self, packet: &[u8]) -> (i32, Vec<u8>) {
        self.run("cil_from_netdev6", packet)
    }

    pub(crate) fn egress6(&mut self, packet: &[u8]) -> (i32, Vec<u8>) {
        self.run("cil_to_netdev6", packet)
    }

    /// Runs ingress and asserts that the packet is passed on as it was.
    #[track_caller]
    pub(crate) fn assert_untouched(&mut self, packet: &[u8]) {
        let (code, out) = self.run(ingress_of(packet), packet);
        assert_eq!((code, out.as_slice()), (NEXT, packet));
    }

    /// Runs ingress and asserts that the packet is dropped, and counted once, for this reason.
    #[track_caller]
    pub(crate) fn assert_dropped(&mut self, packet: &[u8], reason: DropReason) {
        let before = self.dropped(reason, Direction::Ingress);
        let (code, _) = self.run(ingress_of(packet), packet);
        assert_eq!((code, self.dropped(reason, Direction::Ingress)), (SHOT, before + 1), "{reason:?}");
    }

    pub(crate) fn dropped(&self, reason: DropReason, way: Direction) -> u64 {
        let drops = self.maps.drops().expect("counters");
        drops.iter().find(|(r, w, _)| (*r, *w) == (reason, way)).map_or(0, |(_, _, counter)| counter.packets)
    }
}

/// The program that serves a packet's family.
fn ingress_of(packet: &[u8]) -> &'static str {
    if packet[12..14] == [0x86, 0xdd] { "cil_from_netdev6" } else { "cil_from_netdev" }
}

pub(crate) fn device() -> DeviceValue {
    DeviceValue { mac: NODE_MAC, flags: DEVICE_ETHERNET, ipv4: u32::from_ne_bytes(NODE.octets()), ipv6: NODE6.into() }
}

/// A path below the temporary root.
pub(crate) fn pin(root: &BpfRoot, name: &str) -> PathBuf {
    kinesin::datapath::maps_dir(root.path()).join(name)
}
