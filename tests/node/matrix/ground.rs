//! The lab that the cells of one family and mode share: three nodes with agents, four services, a client with routes.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use kinesin::lab::programs::{How, Outcome, PROBE, Probe, Probed};
use kinesin::lab::{AgentHandle, AgentOptions, Lab};
use kinesin::net::proc::Process;
use kinesin::net::rtnl::{Route, Rtnl};
use serde_json::Value;

use super::Mode;
use super::cells::{BARE, Cell, ENTRY, Family, HOST_PORT, OTHER, Plan, Position, manifests, services};
use super::rules::{Expected, entered_by};

/// Source port of the first probe.
const FIRST_PORT: u16 = 20_000;
/// Longer than anything takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

pub(crate) struct Ground {
    agents: BTreeMap<usize, AgentHandle>,
    plan: Plan,
    mode: Mode,
    lab: Lab,
}

/// The elements of a list.
fn rows(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

impl Ground {
    pub(crate) async fn new(name: &str, plan: Plan, mode: Mode) -> Self {
        let builder = Lab::builder(name).binary(env!("CARGO_BIN_EXE_kinesin"));
        let lab = builder.segments(plan.segments).nodes(3).pods_per_node(2).dual_stack().build().await.unwrap();
        let file = lab.manifests_dir().join("all.yaml");
        std::fs::write(file, manifests(plan)).unwrap();
        let mut options = AgentOptions::on_manifests(&lab).config("enable-ipv6", "true");
        for (key, value) in mode.keys {
            options = options.config(key, value);
        }
        let agents = [ENTRY, OTHER, BARE].map(|number| (number, lab.node(number).start_agent(&options).unwrap()));
        for home in [ENTRY, OTHER] {
            lab.pod(home, 1).serve().await.unwrap();
        }
        // What is not on the LAN, the client reaches by the entry node, as by a router's static route.
        let rtnl = Rtnl::open_in(lab.client().netns()).unwrap();
        let eth0 = rtnl.device("eth0").await.unwrap().ifindex;
        for network in plan.routed() {
            let (to, via) = (network.parse().unwrap(), Some(plan.node(ENTRY)));
            rtnl.add_route(Route { to, via, ifindex: eth0, source: None }).await.unwrap();
        }
        // Nobody answers ARP and NDP across a router: it knows where such addresses are, as by BGP.
        let router = Rtnl::open_in(lab.lan()).unwrap();
        for service in services(plan).iter().filter(|service| plan.segment(service.announcer()) != 0) {
            let (to, node) = (service.vip().into(), plan.node(service.announcer()));
            rtnl.add_route(Route { to, via: Some(plan.router()), ifindex: eth0, source: None }).await.unwrap();
            let behind = router.device(&format!("lan{}", plan.segment(service.announcer()))).await.unwrap().ifindex;
            router.add_route(Route { to, via: Some(node), ifindex: behind, source: None }).await.unwrap();
        }
        let ground = Self { agents: BTreeMap::from(agents), plan, mode, lab };
        ground.ready().await;
        ground
    }

    /// Waits until every node has every frontend, and each VIP its announcer.
    async fn ready(&self) {
        for agent in self.agents.values() {
            agent.wait_ready(LIMIT).await.unwrap();
        }
        let deadline = tokio::time::Instant::now() + LIMIT;
        loop {
            match self.missing().await {
                Ok(()) => return,
                Err(what) => assert!(tokio::time::Instant::now() < deadline, "{what}\n{}", self.words()),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Says what is not there yet.
    async fn missing(&self) -> Result<(), String> {
        let programs = match self.plan.family {
            Family::V4 => ["cil_from_netdev", "cil_to_netdev", "cil_sock4_connect", "cil_sock4_sendmsg"],
            Family::V6 => ["cil_from_netdev6", "cil_to_netdev6", "cil_sock6_connect", "cil_sock6_sendmsg"],
        };
        for number in self.agents.keys() {
            let status = self.get(*number, "/v1/status").await?;
            let attached =
                |program: &&str| rows(&status["hooks"]).any(|hook| hook["program"] == **program && hook["ok"] == true);
            if let Some(program) = programs.iter().find(|program| !attached(program)) {
                return Err(format!("node-{number} has no {program}: {}", status["hooks"]));
            }
        }
        for number in self.agents.keys() {
            let frontends = self.get(*number, "/v1/services").await?;
            for service in services(self.plan) {
                let node_port = (self.plan.node(*number), service.node_port());
                let virtual_ips = [service.cluster_ip(), service.vip(), service.external_ip()].map(|ip| (ip, 80));
                let host_port = (self.plan.node(*number), HOST_PORT);
                let host_port = (service.home == *number && service.stands_for_its_pod()).then_some(host_port);
                let addresses: Vec<_> = virtual_ips
                    .into_iter()
                    .chain([node_port])
                    .chain(host_port)
                    .map(|to| SocketAddr::from(to).to_string())
                    .collect();
                for address in addresses.iter().flat_map(|to| [format!("{to}/TCP"), format!("{to}/UDP")]) {
                    let there = rows(&frontends)
                        .any(|frontend| frontend["address"] == address.as_str() && frontend["status"] == "programmed");
                    if !there {
                        return Err(format!("node-{number} does not serve {address} of {}", service.name));
                    }
                }
            }
        }
        for service in services(self.plan) {
            let vips = self.get(service.announcer(), "/v1/vips").await?;
            let vip = service.vip().to_string();
            let announced = rows(&vips).any(|v| v["address"] == vip.as_str() && v["state"] == "announcing");
            if !announced {
                return Err(format!("node-{} does not announce {vip}: {vips}", service.announcer()));
            }
        }
        // Frames are handed on to neighbours that the agent has seen to be nodes.
        for number in self.agents.keys().filter(|_| self.mode.keeps(How::Tcp)) {
            let peers = self.get(*number, "/v1/tables/peers").await?;
            let ready = |state: &str| {
                let field = |row: &Value, name: &str| row[name].as_str().unwrap_or_default().to_owned();
                let of_nodes = rows(&peers["rows"]).filter(|row| field(row, "key").starts_with("node "));
                of_nodes.filter(|row| field(row, "value").ends_with(state)).count()
            };
            let here = |other: usize| self.plan.segment(other) == self.plan.segment(*number);
            let near = self.agents.keys().filter(|other| here(**other)).count() - 1;
            let far = self.agents.len() - 1 - near;
            let known = [" takes-new", " takes-new by-route"].map(ready);
            if known != [near, far] {
                return Err(format!("node-{number} knows {known:?} of {near} neighbours and {far} others: {peers}"));
            }
        }
        Ok(())
    }

    async fn get(&self, number: usize, path: &str) -> Result<Value, String> {
        let (status, body) = self.agents[&number].get(path).await.map_err(|error| error.to_string())?;
        if status == 200 { serde_json::from_str(&body).map_err(|error| error.to_string()) } else { Err(body) }
    }

    /// Asks all cells at once: one process per client.
    pub(crate) async fn ask(&self, cells: &[Cell], limits: Vec<Duration>) -> Vec<Outcome> {
        let mut by_client: BTreeMap<(Position, usize), Vec<Probe>> = BTreeMap::new();
        for (id, (cell, limit)) in cells.iter().zip(limits).enumerate() {
            let limit_ms = limit.as_millis() as u64;
            // The backends of two services on one node are one pod.
            let home = if cell.position == Position::Hairpin { cell.service.home } else { 0 };
            // Outside the ranges of NodePorts and of translation, whose ports on a node are not its sockets' to take.
            let port = FIRST_PORT + id as u16;
            let probe = Probe { id, port, to: cell.to(), how: cell.how, limit_ms };
            by_client.entry((cell.position, home)).or_default().push(probe);
        }
        let mut running = Vec::new();
        for (number, ((position, home), probes)) in by_client.into_iter().enumerate() {
            let file = self.lab.dir().join(format!("probes-{number}"));
            let lines: Vec<String> = probes.iter().map(|probe| serde_json::to_string(probe).unwrap()).collect();
            std::fs::write(&file, lines.join("\n")).unwrap();
            let mut command = Command::new(self.lab.binary());
            command.arg(PROBE).arg("--probes").arg(&file);
            let process = self.start(position, home, command);
            let mut output = process.take_stdout().expect("piped");
            running.push((
                process,
                tokio::task::spawn_blocking(move || {
                    let mut text = String::new();
                    output.read_to_string(&mut text).map(|_| text)
                }),
            ));
        }
        let mut seen = vec![Outcome::Failed { detail: "the probe did not say".into() }; cells.len()];
        for (process, reading) in running {
            let text = tokio::time::timeout(LIMIT, reading).await.expect("probes end").unwrap().unwrap();
            let probed: Vec<Probed> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
            assert!(!probed.is_empty(), "{}", process.report());
            for Probed { id, outcome } in probed {
                seen[id] = outcome;
            }
        }
        seen
    }

    fn start(&self, position: Position, home: usize, command: Command) -> Process {
        let (netns, cgroup) = match position {
            Position::Lan => (self.lab.client().netns().clone(), self.lab.client().cgroup().to_path_buf()),
            Position::Host(number) => {
                (self.lab.node(number).netns().clone(), self.lab.node(number).cgroup().to_path_buf())
            }
            Position::Pod(number) => {
                (self.lab.pod(number, 2).netns().clone(), self.lab.pod(number, 2).cgroup().to_path_buf())
            }
            Position::Hairpin => (self.lab.pod(home, 1).netns().clone(), self.lab.pod(home, 1).cgroup().to_path_buf()),
        };
        let log = self.lab.dir().join("logs").join("probe.log");
        let prepared = Process::command(format!("the probe of {position:?}"), command).netns(&netns).cgroup(&cgroup);
        prepared.log(&log).piped_stdout().start().unwrap()
    }

    /// What `kinesin trace` says of each cell, where it is another thing than what must come of it.
    pub(crate) async fn traces(&self, cells: &[Cell], expected: &[Expected]) -> Vec<String> {
        let mut wrong = Vec::new();
        for (cell, expected) in cells.iter().zip(expected) {
            // Connected or not, the programs decide alike; ICMP errors differ only in who hears of them.
            if cell.how == How::UdpUnconnected {
                continue;
            }
            let (number, src) = match (entered_by(cell), cell.node()) {
                (Some(entry), None) => (entry, cell.client().to_string()),
                // From another node the packet passes its own first, which has nothing to say about it.
                (Some(_), Some(_)) => continue,
                (None, node) => (node.expect("on a node"), cell.client().to_string()),
            };
            let proto = if cell.how == How::Tcp { "tcp" } else { "udp" };
            let path = format!("/v1/trace?src={src}&dst={}&proto={proto}", cell.to());
            let trace = match self.get(number, &path).await {
                Ok(trace) => trace,
                Err(error) => {
                    wrong.push(format!("{cell}: no trace: {error}"));
                    continue;
                }
            };
            let verdict = &trace["ways"][0]["verdict"];
            let backend = trace["ways"][0]["backend"]["address"].as_str().unwrap_or_default();
            let fits = match expected {
                Expected::Answered { .. } => {
                    let kind = verdict["kind"].as_str().unwrap_or_default();
                    ["connects", "translated", "sent", "handed-on", "wrapped"].contains(&kind)
                        && backend.parse::<SocketAddr>().is_ok_and(|to| to.ip() == cell.service.backend_address())
                }
                Expected::Denied => verdict["kind"] == "denied",
                Expected::Refused => verdict["kind"] == "dropped" && !verdict["told"].is_null(),
                Expected::Silent => verdict["kind"] == "dropped",
            };
            if !fits || trace["ways"].as_array().is_none_or(|ways| ways.len() != 1) {
                wrong.push(format!("{cell}: expected {expected:?}, the trace on node-{number} says {trace}"));
            }
        }
        wrong
    }

    /// The agents' last words.
    pub(crate) fn words(&self) -> String {
        let each = self.agents.iter().map(|(number, agent)| format!("node-{number}:\n{}", agent.logs(15)));
        each.collect::<Vec<_>>().join("\n")
    }
}
