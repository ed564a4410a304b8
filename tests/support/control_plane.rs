//! A real etcd and kube-apiserver for one test, on the loopback or inside a network namespace, with kubectl beside them.
//!
//! The programs come from `tests/controlplane` through `scripts/controlplane.sh`, or from the path in the environment
//! variable `KINESIN_CONTROLPLANE`. etcd listens on a unix socket in the control plane's directory, so any number of them
//! run side by side, and the API server alone has a port. Everything lives in that directory; nothing else is touched.
//! Calls block: from async code, make them in `spawn_blocking`.
//!
//! Deliberately absent: nodes. What a kubelet or a scheduler would write, a test applies itself.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::json;

use super::process::{Process, enter_netns, in_netns};
use super::try_wait_until;

/// Two cores, busy with other tests: an API server that needs 3 s alone has needed ten times that.
const READY_WITHIN: Duration = Duration::from_secs(180);
const ETCD_LISTENS_WITHIN: Duration = Duration::from_secs(20);
const STOP_GRACE: Duration = Duration::from_secs(20);
/// Below the ephemeral ports (a client's port could take it) and below the NodePorts (which would shadow it).
const PORTS: std::ops::Range<u16> = 20_000..30_000;

/// How a [`ControlPlane`] is set up; `Options::default()` is a single one on the loopback.
#[derive(Debug, Clone)]
pub struct Options {
    /// The network namespace that the API server and kubectl run in: a file such as `/run/netns/x`. `None`: the caller's.
    pub netns: Option<PathBuf>,
    /// The address the API server listens on; it must exist in the namespace.
    pub bind: IpAddr,
    /// The address clients and the `kubernetes` Service use, and the certificate names. `None`: the same as `bind`.
    pub advertise: Option<IpAddr>,
    /// The API server's port. `None`: a free one.
    pub port: Option<u16>,
    /// Where ClusterIPs come from; "v4,v6" for both families.
    pub service_cidr: String,
    /// Clients other than the administrator, each with a token and a kubeconfig of its own. They start with the rights
    /// their groups have: a test that proves least privilege applies the role bindings.
    pub users: Vec<User>,
    /// Further flags of the API server.
    pub api_server_args: Vec<String>,
}

/// A client of the API server.
#[derive(Debug, Clone)]
pub struct User {
    pub name: String,
    pub groups: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            netns: None,
            bind: Ipv4Addr::LOCALHOST.into(),
            advertise: None,
            port: None,
            service_cidr: "10.96.0.0/16".into(),
            users: Vec::new(),
            api_server_args: Vec::new(),
        }
    }
}

/// A running control plane; all its processes end when it is dropped, or with the test process.
#[derive(Debug)]
pub struct ControlPlane {
    program: PathBuf,
    dir: PathBuf,
    options: Options,
    port: u16,
    // Dropped in this order: clients before what they talk to.
    components: Vec<Process>,
    api_server: Option<Process>,
    etcd: Option<Process>,
}

impl ControlPlane {
    /// Starts one with its files in `dir` (made if missing) and waits until it serves.
    ///
    /// # Errors
    /// The program cannot be built or run, an address cannot be bound, or it is not ready in three minutes; the error
    /// carries the end of the logs.
    pub fn start(dir: &Path, options: Options) -> Result<Self> {
        let program = program()?.to_owned();
        std::fs::create_dir_all(dir).with_context(|| format!("directory {}", dir.display()))?;
        let dir = dir.canonicalize()?;

        let key = dir.join("service-account.key");
        let made = Command::new(&program).arg("genkey").arg(&key).output()?;
        if !made.status.success() {
            bail!("controlplane genkey: {}", String::from_utf8_lossy(&made.stderr));
        }
        write_tokens(&dir, &options.users)?;

        let mut plane = Self { program, dir, port: 0, options, components: Vec::new(), api_server: None, etcd: None };
        // A free port is only free when it was looked at; another test may take it before the API server does.
        for _ in 0..3 {
            plane.port = match plane.options.port {
                Some(port) => port,
                None => free_port(plane.options.bind, plane.options.netns.as_deref())?,
            };
            plane.write_kubeconfigs()?;
            match plane.run() {
                Ok(()) => return Ok(plane),
                Err(error) if format!("{error:#}").contains("address already in use") => plane.kill(),
                Err(error) => return Err(error),
            }
        }
        bail!("no free port for the API server on {} in three attempts", plane.options.bind)
    }

    /// Where clients reach the API server.
    pub fn url(&self) -> String {
        let ip = self.options.advertise.unwrap_or(self.options.bind);
        format!("https://{}", SocketAddr::new(ip, self.port))
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.kubeconfig_of("admin")
    }

    /// The kubeconfig of a user named in [`Options::users`].
    pub fn kubeconfig_of(&self, user: &str) -> PathBuf {
        self.dir.join(format!("{user}.kubeconfig"))
    }

    /// Runs kubectl as administrator, to its end.
    pub fn kubectl(&self, args: &[&str]) -> Output {
        self.kubectl_with_input(args, "")
    }

    /// Runs kubectl as administrator with `input` on its standard input (`-f -`).
    pub fn kubectl_with_input(&self, args: &[&str], input: &str) -> Output {
        self.try_kubectl(args, input).unwrap_or_else(|error| panic!("kubectl {args:?} could not run: {error}"))
    }

    /// Runs kubectl, panics with its error when it fails, and gives its output.
    #[track_caller]
    pub fn kubectl_ok(&self, args: &[&str]) -> String {
        succeeded(args, self.kubectl(args))
    }

    /// Applies one or more YAML documents, panics with kubectl's error when it fails, and gives its output.
    #[track_caller]
    pub fn kubectl_apply(&self, yaml: &str) -> String {
        let args = ["apply", "-f", "-"];
        succeeded(&args, self.kubectl_with_input(&args, yaml))
    }

    /// Starts another component of the program (`kube-controller-manager`, `kube-proxy`) in the control plane's
    /// namespace, with the administrator's kubeconfig.
    ///
    /// # Errors
    /// The program cannot be executed. Whether it works is for the test to see.
    pub fn start_component(&mut self, name: &str, args: &[&str]) -> Result<()> {
        let mut command = self.command(name);
        command.arg(format!("--kubeconfig={}", self.kubeconfig().display())).args(args);
        let process = self.spawn(name, command)?;
        self.components.push(process);
        Ok(())
    }

    /// An outage of the whole control plane, at once: `kill -9` of the API server and etcd. Clients see connections end.
    pub fn kill(&mut self) {
        for process in self.api_server.iter_mut().chain(self.etcd.iter_mut()) {
            process.kill();
        }
        self.api_server = None;
        self.etcd = None;
    }

    /// An orderly end of the API server and etcd (a rolling upgrade): SIGTERM, then SIGKILL after 20 s.
    pub fn stop(&mut self) {
        for mut process in self.api_server.take().into_iter().chain(self.etcd.take()) {
            process.stop(STOP_GRACE);
        }
    }

    /// Ends whatever still runs of it and starts it again on the same port, with the same data, certificates and tokens;
    /// returns when it serves.
    ///
    /// # Errors
    /// As [`ControlPlane::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.kill();
        self.run()
    }

    /// The end of every component's log, for a failing test's message.
    pub fn log_tails(&self) -> String {
        let all = self.etcd.iter().chain(self.api_server.iter()).chain(self.components.iter());
        all.map(|process| process.log_tail(40)).collect()
    }

    fn command(&self, component: &str) -> Command {
        let mut command = Command::new(&self.program);
        // In its directory: etcd's socket is named relative to it, because a socket's path ends at 107 bytes (unix(7)).
        command.arg(component).current_dir(&self.dir).env("HOME", &self.dir).env_remove("KUBECONFIG");
        command
    }

    fn spawn(&self, name: &str, command: Command) -> Result<Process> {
        let log = self.dir.join(format!("{name}.log"));
        Process::spawn(name, command, self.options.netns.as_deref(), &log).with_context(|| format!("starting {name}"))
    }

    fn run(&mut self) -> Result<()> {
        for socket in ["etcd.sock:0", "peer.sock:0"] {
            let _ = std::fs::remove_file(self.dir.join(socket)); // left behind by kill -9
        }
        let _ = std::fs::remove_file(self.dir.join("kube-apiserver.log"));

        let mut etcd = self.command("etcd");
        etcd.args([
            "--data-dir=etcd",
            "--listen-client-urls=unix://etcd.sock:0",
            "--advertise-client-urls=unix://etcd.sock:0",
            "--listen-peer-urls=unix://peer.sock:0",
            "--initial-advertise-peer-urls=unix://peer.sock:0",
            "--initial-cluster=default=unix://peer.sock:0",
            // What kill -9 leaves is in the page cache, and a test does not outlive the kernel.
            "--unsafe-no-fsync",
            "--log-level=warn",
        ]);
        self.etcd = Some(self.spawn("etcd", etcd)?);
        // An API server that comes first waits a second before it tries again. One that etcd never meets says so itself.
        let socket = self.dir.join("etcd.sock:0");
        let _ = try_wait_until(ETCD_LISTENS_WITHIN, || socket.try_exists().ok().filter(|there| *there).ok_or(()));

        let Options { bind, advertise, service_cidr, api_server_args, .. } = &self.options;
        let advertise = advertise.unwrap_or(*bind);
        let mut server = self.command("kube-apiserver");
        server.args([
            "--etcd-servers=unix://etcd.sock:0",
            "--cert-dir=certificates",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-account-key-file=service-account.key",
            "--service-account-signing-key-file=service-account.key",
            "--token-auth-file=tokens.csv",
            "--authorization-mode=RBAC",
            "--allow-privileged",
            // There is no controller that would make the accounts it asks for.
            "--disable-admission-plugins=ServiceAccount",
        ]);
        server.arg(format!("--service-cluster-ip-range={service_cidr}"));
        server.arg(format!("--bind-address={bind}")).arg(format!("--secure-port={}", self.port));
        server.arg(format!("--advertise-address={advertise}"));
        if advertise.is_loopback() {
            // The endpoints of the `kubernetes` Service may not be loopback addresses.
            server.arg("--endpoint-reconciler-type=none");
        }
        server.args(api_server_args);
        self.api_server = Some(self.spawn("kube-apiserver", server)?);
        self.wait_ready()
    }

    fn wait_ready(&mut self) -> Result<()> {
        let ready = try_wait_until(READY_WITHIN, || {
            for process in self.api_server.iter_mut().chain(self.etcd.iter_mut()) {
                if let Some(status) = process.exited() {
                    return Ok(Err(anyhow!("ended with {status}")));
                }
            }
            self.probe().map(Ok)
        });
        ready
            .unwrap_or_else(|error| Err(error.context(format!("not ready after {READY_WITHIN:?}"))))
            .with_context(|| format!("control plane in {}\n{}", self.dir.display(), self.log_tails()))
    }

    /// One look: the API server says it is ready, and has made the `kubernetes` Service (the last thing it makes).
    fn probe(&self) -> Result<()> {
        // kubectl takes a core for a tenth of a second, which the API server needs until it listens at all.
        let address = SocketAddr::new(self.options.advertise.unwrap_or(self.options.bind), self.port);
        in_netns(self.options.netns.as_deref(), || Ok(TcpStream::connect_timeout(&address, Duration::from_secs(5))?))?;
        for args in [["get", "--raw", "/readyz"].as_slice(), &["get", "service", "kubernetes"]] {
            let output = self.try_kubectl(args, "")?;
            if !output.status.success() {
                bail!("kubectl {args:?}: {}", String::from_utf8_lossy(&output.stderr));
            }
        }
        Ok(())
    }

    fn try_kubectl(&self, args: &[&str], input: &str) -> Result<Output> {
        let mut command = self.command("kubectl");
        command.arg(format!("--kubeconfig={}", self.kubeconfig().display())).args(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        enter_netns(&mut command, self.options.netns.as_deref())?;
        let mut child = command.spawn()?;
        let mut stdin = child.stdin.take().expect("it was asked for");
        // From another thread, because kubectl may fill its output before it has read all of its input.
        let output = std::thread::scope(|scope| {
            scope.spawn(move || {
                // It may end without reading: then its own message says why.
                let _ = stdin.write_all(input.as_bytes());
            });
            child.wait_with_output()
        });
        Ok(output?)
    }

    fn write_kubeconfigs(&self) -> Result<()> {
        let tokens = std::fs::read_to_string(self.dir.join("tokens.csv"))?;
        for line in tokens.lines() {
            let mut fields = line.split(',');
            let (Some(token), Some(user)) = (fields.next(), fields.next()) else { bail!("tokens.csv: {line:?}") };
            // JSON is YAML, and needs no quoting rules.
            let config = json!({
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "clusters": [{ "name": "test", "cluster": {
                    "server": self.url(),
                    // The API server writes its certificate and the authority that signed it into one file.
                    "certificate-authority": self.dir.join("certificates/apiserver.crt"),
                }}],
                "users": [{ "name": user, "user": { "token": token } }],
                "contexts": [{ "name": "test", "context": { "cluster": "test", "user": user, "namespace": "default" } }],
            });
            std::fs::write(self.kubeconfig_of(user), serde_json::to_vec_pretty(&config)?)?;
        }
        Ok(())
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log_tails());
        }
    }
}

/// The program, built at most once per test process.
fn program() -> Result<&'static Path> {
    static PROGRAM: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let found = PROGRAM.get_or_init(|| {
        if let Some(path) = std::env::var_os("KINESIN_CONTROLPLANE") {
            return Ok(path.into());
        }
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/controlplane.sh");
        let output = Command::new(script).output().map_err(|error| format!("{script}: {error}"))?;
        if !output.status.success() {
            return Err(format!("{script}:\n{}", String::from_utf8_lossy(&output.stderr)));
        }
        Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim_end()))
    });
    found.as_deref().map_err(|error| anyhow!("no control plane to run: {error}"))
}

/// Static tokens (`token,user,uid,"groups"`), fresh for every control plane.
fn write_tokens(dir: &Path, users: &[User]) -> Result<()> {
    let mut file = String::new();
    let admin = User { name: "admin".into(), groups: vec!["system:masters".into()] };
    for user in std::iter::once(&admin).chain(users) {
        let token: u128 = rand::random();
        let groups = user.groups.join(",");
        file.push_str(&format!("{token:032x},{name},{name},\"{groups}\"\n", name = user.name));
    }
    std::fs::write(dir.join("tokens.csv"), file)?;
    Ok(())
}

/// A port that nothing in the namespace listens on at `ip` now.
fn free_port(ip: IpAddr, netns: Option<&Path>) -> Result<u16> {
    in_netns(netns, || {
        let mut last = anyhow!("never tried");
        for _ in 0..100 {
            let port = rand::random_range(PORTS);
            match TcpListener::bind((ip, port)) {
                Ok(_) => return Ok(port),
                Err(error) => last = error.into(),
            }
        }
        Err(last.context(format!("no port of {PORTS:?} can be bound on {ip}")))
    })
}

#[track_caller]
fn succeeded(args: &[&str], output: Output) -> String {
    assert!(
        output.status.success(),
        "kubectl {args:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
