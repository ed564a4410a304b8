//! `kinesin lab`: a whole small cluster to look at, a power cut, and time to try things.
//!
//! The agents are this very binary, the objects are files, and everything shown was asked from outside: the address and
//! its owner from the socket of a living agent, the MAC from the LAN, the requests from the client's own books.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use kinesin_core::devices::mac_text;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use super::programs::ClientOptions;
use super::report::Totals;
use super::view::{Picture, Screen, Vip, traffic};
use super::{AgentHandle, AgentOptions, ECHO_PORT, Lab, LoadHandle, Node, manifests};

/// Bound for everything that should take a second or two.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(250);
/// New connections per second, and long-lived ones beside them.
const RATE: u32 = 50;
const HELD: u32 = 10;
/// How long the dead agent's node is watched serving without it. Less than the lease, or another would take over.
const WITHOUT_AGENT: Duration = Duration::from_millis(1500);

/// Arguments of `kinesin lab`.
#[derive(Debug, Clone, clap::Args)]
pub struct LabOptions {
    /// Show everything once and end; fail when something did not hold
    #[arg(long)]
    pub once: bool,
    /// How many nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=9))]
    pub nodes: u8,
    /// How many web pods on each node
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=9))]
    pub pods: u8,
    /// What namespaces and directories are named after
    #[arg(long, default_value = "lab")]
    pub name: String,
    /// The binary to run on the nodes; this one unless a test says otherwise
    #[arg(skip)]
    pub binary: Option<PathBuf>,
}

/// Runs the lab until it is told to stop, or once. Whatever happens, everything that it made is removed.
///
/// # Errors
/// Without root, when the kernel refuses something, or with `once` when something did not hold.
pub async fn run(options: LabOptions) -> anyhow::Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "kinesin lab makes network namespaces: run it as root, for example with sudo"
    );
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let once = options.once;
    // Dropping the show drops the lab.
    let ended = tokio::select! {
        result = show(options) => result,
        _ = interrupt.recv() => Err(anyhow::anyhow!("interrupted")),
        _ = terminate.recv() => Err(anyhow::anyhow!("terminated")),
    };
    match ended {
        // Ctrl-C is how a visit to the lab ends.
        Err(error) if !once && ["interrupted", "terminated"].contains(&error.to_string().as_str()) => {
            Screen::new().print("\nEverything of the lab is removed.\n");
            Ok(())
        }
        other => other,
    }
}

/// [`run`] for callers without a runtime, such as the command line.
///
/// # Errors
/// As [`run`].
pub fn run_to_end(options: LabOptions) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start a runtime")?;
    runtime.block_on(run(options))
}

async fn show(options: LabOptions) -> anyhow::Result<()> {
    let once = options.once;
    let mut show = Show::set_up(options).await?;
    let outcome = show.play().await;
    if let Err(error) = outcome {
        show.show_logs();
        return Err(error);
    }
    if once {
        return show.verdict();
    }
    show.bring_back().await?;
    show.stay().await
}

/// Everything of a running lab, as `kinesin lab` knows it.
struct Show {
    // The load and the agents end before the lab that they run in.
    load: Option<LoadHandle>,
    agents: Vec<Option<AgentHandle>>,
    lab: Lab,
    binary: PathBuf,
    screen: Screen,
    started: Instant,
    vips: Vec<Vip>,
    /// Numbers of nodes without power.
    down: Vec<usize>,
    checks: Vec<(String, bool)>,
}

impl Show {
    async fn set_up(options: LabOptions) -> anyhow::Result<Self> {
        let started = Instant::now();
        let binary = match options.binary {
            Some(path) => path,
            None => std::env::current_exe().context("find this executable")?,
        };
        let builder = Lab::builder(&options.name).nodes(options.nodes.into()).pods_per_node(options.pods.into());
        let lab = builder.binary(&binary).build().await.context("build the lab's network")?;
        let agents = lab.nodes().iter().map(|_| None).collect();
        let screen = Screen::new();
        let (vips, down, checks) = (Vec::new(), Vec::new(), Vec::new());
        let mut show = Self { load: None, agents, lab, binary, screen, started, vips, down, checks };
        let (nodes, pods) = (options.nodes, options.pods);
        show.say(&format!(
            "{nodes} nodes with {pods} web pods each, a LAN and a client, in namespaces named {}.*",
            show.lab.id()
        ));
        Ok(show)
    }

    /// The whole story, up to the other node serving.
    async fn play(&mut self) -> anyhow::Result<()> {
        manifests::write_all(&self.lab)?;
        for pod in self.lab.pods() {
            pod.serve().await?;
        }
        for number in 1..=self.agents.len() {
            self.start_agent(number)?;
        }
        for agent in self.agents.iter().flatten() {
            agent.wait_ready(PATIENCE).await?;
        }
        self.say("agents are ready; pool and policy are those of a homelab guide, as they stand");

        let address = self.wait_for_address().await?;
        let first = self.wait_for_owner(address, &[]).await?;
        self.say(&format!("{address} was given to {} and belongs to {}", manifests::SERVICE, first.name()));
        self.check_wire(address, &first).await?;
        self.check_client(address, &first).await?;
        self.start_load(address)?;
        self.wait_for_backends("every backend has answered ten requests", |_, (_, now)| now >= 10).await?;
        let calm = self.totals();
        self.check("all backends answered, nothing failed", calm.failed == 0 && calm.held.broken == 0);
        self.print_picture();

        self.kill_agent(&first).await?;
        self.cut_power(address, &first).await
    }

    /// A pod on another node than the address's owner is asked who asks: it should be the client itself, as soon as the
    /// nodes know each other.
    async fn check_client(&mut self, address: Ipv4Addr, owner: &Node) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let client = self.lab.client().clone();
        let mut last = None;
        while Instant::now() < deadline {
            let asked = client.get(&format!("http://{address}/")).await;
            let elsewhere = asked.ok().and_then(|answer| answer.backend).filter(|backend| backend.node != owner.name());
            if let Some(backend) = elsewhere {
                let itself = backend.client.ip() == client.address();
                last = Some(backend);
                if itself {
                    break;
                }
            }
            tokio::time::sleep(LOOK / 10).await;
        }
        let Some(backend) = last else {
            bail!("no pod on another node than {} answered within {PATIENCE:?}", owner.name())
        };
        let (pod, node, seen) = (&backend.pod, &backend.node, backend.client.ip());
        self.say(&format!("{pod} on {node} sees the client as {seen}, although {} owns {address}", owner.name()));
        self.check("pods on other nodes see the client's own address", seen == client.address());
        Ok(())
    }

    /// The agent alone dies: the kernel goes on.
    async fn kill_agent(&mut self, owner: &Node) -> anyhow::Result<()> {
        let before = self.totals();
        if let Some(agent) = self.agents[owner.number() - 1].take() {
            agent.kill9();
        }
        self.say(&format!("killed the agent of {} with SIGKILL", owner.name()));
        let until = Instant::now() + WITHOUT_AGENT;
        while Instant::now() < until {
            self.look().await;
            tokio::time::sleep(LOOK).await;
        }
        let after = self.totals();
        let lost = after.failed - before.failed + after.held.broken - before.held.broken;
        let answered = after.succeeded - before.succeeded;
        let why = if lost == 0 { ": the kernel's programs do the work" } else { "" };
        self.say(&format!("without it {answered} requests were answered and {lost} connections lost{why}"));
        self.check("killing the agent lost no connection", lost == 0 && answered > 0);
        Ok(())
    }

    /// The whole node dies: another one takes over.
    async fn cut_power(&mut self, address: Ipv4Addr, first: &Node) -> anyhow::Result<()> {
        let before = self.totals();
        first.power_off().await?;
        let cut = Instant::now();
        self.down.push(first.number());
        self.say(&format!("cut the power of {}", first.name()));
        // In a cluster the control plane would notice after a while.
        manifests::write_endpoints(&self.lab, &[first.name()])?;
        let second = self.wait_for_owner(address, &[first.number()]).await?;
        let took = cut.elapsed();
        self.check_wire(address, &second).await?;
        let dead = first.name().to_string();
        self.wait_for_backends("the other backends answer again", move |node, (then, now)| {
            node == dead || now > then + 3
        })
        .await?;
        let after = self.totals();
        self.say(&format!(
            "{} took over {address} after {:.1} s; the client's longest gap was {} ms, {} of {} requests failed",
            second.name(),
            took.as_secs_f32(),
            after.longest_gap_ms,
            after.failed - before.failed,
            after.attempted - before.attempted,
        ));
        self.check(&format!("{} took over from {}", second.name(), first.name()), second.number() != first.number());
        self.print_picture();
        Ok(())
    }

    /// The dead node comes back, for those who stay.
    async fn bring_back(&mut self) -> anyhow::Result<()> {
        for number in std::mem::take(&mut self.down) {
            let node = self.lab.node(number).clone();
            node.restore_link().await?;
            for pod in node.pods() {
                pod.serve().await?;
            }
            self.start_agent(number)?;
            self.say(&format!("{} is back; it does not take the address back", node.name()));
        }
        Ok(manifests::write_endpoints(&self.lab, &[])?)
    }

    /// Stays until the future is dropped.
    async fn stay(&mut self) -> anyhow::Result<()> {
        let help = self.help();
        self.screen.print(&help);
        loop {
            let before: Vec<_> = self.vips.iter().map(|vip| (vip.address.clone(), vip.owner.clone())).collect();
            self.look().await;
            for vip in self.vips.clone() {
                if !before.contains(&(vip.address.clone(), vip.owner.clone())) {
                    self.say(&format!("{} ({}) is with {}", vip.address, vip.services, name_or_nobody(&vip.owner)));
                }
            }
            for number in 1..=self.agents.len() {
                let ended = self.agents[number - 1].as_ref().is_some_and(|a| a.process().exit_status().is_some());
                if ended {
                    self.agents[number - 1] = None;
                    self.say(&format!("the agent of node-{number} has ended; its last words are in the logs"));
                }
            }
            tokio::time::sleep(LOOK * 2).await;
        }
    }

    fn start_agent(&mut self, number: usize) -> anyhow::Result<()> {
        let node = self.lab.node(number);
        let options = AgentOptions::on_manifests(&self.lab).binary(&self.binary);
        self.agents[number - 1] = Some(node.start_agent(&options)?);
        Ok(())
    }

    fn start_load(&mut self, address: Ipv4Addr) -> anyhow::Result<()> {
        let options = ClientOptions::new(format!("http://{address}/"))
            .rate(RATE)
            .hold(HELD, SocketAddr::from((address, ECHO_PORT)));
        self.load = Some(self.lab.client().load(&options)?);
        self.say(&format!("the client opens {RATE} connections per second and holds {HELD} more"));
        Ok(())
    }

    /// Waits until the service has an address from the pool.
    async fn wait_for_address(&mut self) -> anyhow::Result<Ipv4Addr> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.look().await;
            let found = self.vips.iter().find(|vip| vip.services.contains(manifests::SERVICE));
            if let Some(address) = found.and_then(|vip| vip.address.parse::<Ipv4Addr>().ok()) {
                let in_pool = (Ipv4Addr::new(10, 0, 0, 100)..=Ipv4Addr::new(10, 0, 0, 200)).contains(&address);
                self.check(&format!("{address} is from the pool"), in_pool);
                return Ok(address);
            }
            ensure!(Instant::now() < deadline, "the service {} got no address within {PATIENCE:?}", manifests::SERVICE);
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until a living node owns the address and the LAN hears that node, and nobody else, answer for it.
    async fn wait_for_owner(&mut self, address: Ipv4Addr, not: &[usize]) -> anyhow::Result<Node> {
        let deadline = Instant::now() + PATIENCE;
        let mut heard = Vec::new();
        loop {
            self.look().await;
            let name = self.vips.iter().find(|vip| vip.address == address.to_string()).map(|vip| vip.owner.clone());
            let owner = self.lab.nodes().iter().find(|node| Some(node.name()) == name.as_deref()).cloned();
            if let Some(owner) = owner
                && !not.contains(&owner.number())
            {
                heard = self.lab.client().arp_probe(address).await?;
                if heard == [owner.mac().await?] {
                    return Ok(owner);
                }
            }
            if Instant::now() > deadline {
                let heard: Vec<String> = heard.into_iter().map(mac_text).collect();
                let owner = name_or_nobody(&name.unwrap_or_default()).to_string();
                bail!("after {PATIENCE:?} the agents say that {address} is with {owner}, and the LAN hears {heard:?}");
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Exactly one answer on the wire, and it is the owner's.
    async fn check_wire(&mut self, address: Ipv4Addr, owner: &Node) -> anyhow::Result<()> {
        let heard = self.lab.client().arp_probe(address).await?;
        let expected = owner.mac().await?;
        self.check(&format!("exactly one MAC answers for {address}, that of {}", owner.name()), heard == [expected]);
        Ok(())
    }

    /// Waits until a condition holds for every backend: its node, and its answers at the start of the wait and now.
    async fn wait_for_backends(&mut self, what: &str, enough: impl Fn(&str, (u64, u64)) -> bool) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let at_start = self.totals().backends;
        loop {
            self.look().await;
            let totals = self.totals();
            let count = |of: &std::collections::BTreeMap<String, u64>, pod: &str| of.get(pod).copied().unwrap_or(0);
            let all = self.lab.pods().iter().all(|pod| {
                let (then, now) = (count(&at_start, pod.name()), count(&totals.backends, pod.name()));
                enough(pod.node(), (then, now)) || self.is_down(pod.node())
            });
            if all {
                return Ok(());
            }
            if Instant::now() > deadline {
                let load = self.load.as_ref().map_or_else(String::new, |load| load.process().report());
                bail!("not within {PATIENCE:?}: {what}; {}\n{load}", traffic(&totals));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn is_down(&self, node: &str) -> bool {
        self.down.iter().any(|number| self.lab.node(*number).name() == node)
    }

    fn totals(&self) -> Totals {
        self.load.as_ref().map(LoadHandle::totals).unwrap_or_default()
    }

    /// Asks everybody what is shown, and shows it.
    async fn look(&mut self) {
        if let Some(vips) = self.ask_an_agent().await {
            self.vips = vips;
        }
        if let Ok(table) = self.lab.client().arp_table().await {
            for vip in &mut self.vips {
                let entry = table.iter().find(|entry| entry.address.to_string() == vip.address);
                vip.lan_mac = entry.and_then(|entry| entry.mac);
            }
        }
        let picture = self.picture();
        self.screen.draw(&picture);
    }

    fn picture(&self) -> Picture {
        let pods = self.lab.pods();
        let pods = pods.iter().map(|p| (p.name().into(), p.node().into(), !self.is_down(p.node()))).collect();
        Picture { up: self.started.elapsed(), vips: self.vips.clone(), pods, totals: self.totals() }
    }

    /// What `kinesin vips` shows, from the first agent that answers.
    async fn ask_an_agent(&self) -> Option<Vec<Vip>> {
        for agent in self.agents.iter().flatten() {
            let Ok((200, body)) = agent.get("/v1/vips").await else { continue };
            let Ok(Value::Array(rows)) = serde_json::from_str(&body) else { continue };
            let mut vips: Vec<Vip> = rows.iter().map(vip).collect();
            for vip in &mut vips {
                // Only the owner's agent knows its MAC; the interface itself is a better witness anyway.
                let owner = self.lab.nodes().iter().find(|node| node.name() == vip.owner);
                if let Some(owner) = owner {
                    vip.owner_mac = owner.mac().await.ok();
                }
            }
            return Some(vips);
        }
        None
    }

    fn say(&mut self, text: &str) {
        let up = self.started.elapsed();
        self.screen.event(up, text);
        let picture = self.picture();
        self.screen.draw(&picture);
    }

    fn check(&mut self, what: &str, holds: bool) {
        self.checks.push((what.to_string(), holds));
        if !holds {
            self.say(&format!("DID NOT HOLD: {what}"));
        }
    }

    /// Where nothing is redrawn, the tables at the turning points.
    fn print_picture(&mut self) {
        if !self.screen.is_terminal() {
            let text = self.picture().to_text(false);
            self.screen.print(&format!("\n{text}\n"));
        }
    }

    fn verdict(&mut self) -> anyhow::Result<()> {
        let mut text = String::from("\n");
        for (what, holds) in &self.checks {
            text.push_str(&format!("{}  {what}\n", if *holds { "ok    " } else { "FAILED" }));
        }
        let failed = self.checks.iter().filter(|(_, holds)| !holds).count();
        if self.screen.is_terminal() {
            // The last picture stays.
            let picture = self.picture().to_text(true);
            text = format!("{picture}{text}");
        }
        self.screen.print(&text);
        if failed > 0 {
            self.show_logs();
            bail!("{failed} of {} expectations did not hold", self.checks.len());
        }
        Ok(())
    }

    /// The lab's files go with the lab, so what its agents said last goes to the person now.
    fn show_logs(&mut self) {
        let mut text = String::new();
        for node in self.lab.nodes() {
            let tail = crate::net::proc::tail(&node.log("agent"), 20);
            text.push_str(&format!("\nlast lines of the agent on {}:\n{tail}\n", node.name()));
        }
        self.screen.print(&text);
    }

    fn help(&self) -> String {
        let binary = self.binary.display();
        let node = self.lab.node(1);
        let socket = node.agent_socket();
        let address = self.vips.first().map_or("10.0.0.100", |vip| vip.address.as_str());
        format!(
            "
Now try things; Ctrl-C ends the lab and removes everything.

  enter a node       nsenter --net={node_ns}
  be the client      nsenter --net={client_ns} curl http://{address}/
  ask an agent       {binary} vips --socket-path {socket}
                     {binary} services --socket-path {socket}
                     {binary} get services -o yaml --socket-path {socket}
  change objects     {manifests}/*.yaml
  read logs          {logs}/

",
            node_ns = node.netns().path().display(),
            client_ns = self.lab.client().netns().path().display(),
            socket = socket.display(),
            manifests = self.lab.manifests_dir().display(),
            logs = self.lab.dir().join("logs").display(),
        )
    }
}

fn name_or_nobody(name: &str) -> &str {
    if name.is_empty() { "nobody" } else { name }
}

/// A row of `/v1/vips`.
fn vip(row: &Value) -> Vip {
    let text = |key: &str| row.get(key).and_then(Value::as_str).unwrap_or_default().to_string();
    let services = match row.get("services") {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
        _ => text("services"),
    };
    Vip { address: text("address"), services, owner: text("owner"), owner_mac: None, lan_mac: None }
}
