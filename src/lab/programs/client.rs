//! A client that counts: new connections at a rate, long-lived connections beside them, one JSON line per event.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::say;
use super::tally::{Tally, millis};
use crate::lab::client::request;
use crate::lab::report::{Backend, Held, LoadEvent, Reason};

/// Arguments of `kinesin lab-client`. Times are in milliseconds, so that the line is easy to make and read.
#[derive(Debug, Clone, clap::Args)]
pub struct ClientOptions {
    /// What to request, each time on a new connection: `http://<address>[:port][/path]`
    #[arg(long)]
    pub url: Option<String>,
    /// New connections per second
    #[arg(long, default_value_t = 50)]
    pub rate: u32,
    /// How long a request may take from the first SYN to the end of the answer
    #[arg(long, default_value_t = 500)]
    pub timeout_ms: u64,
    /// Long-lived connections to keep
    #[arg(long, default_value_t = 0)]
    pub hold: u32,
    /// Where they go: the address and port of an echo service
    #[arg(long)]
    pub hold_address: Option<SocketAddr>,
    /// Pause between two echoes of a long-lived connection
    #[arg(long, default_value_t = 100)]
    pub hold_pause_ms: u64,
    /// After how long without its echo a long-lived connection counts as broken
    #[arg(long, default_value_t = 15_000)]
    pub hold_timeout_ms: u64,
    /// When to stop; without it, at SIGTERM or SIGINT
    #[arg(long)]
    pub duration_ms: Option<u64>,
    /// Pause between two lines of totals
    #[arg(long, default_value_t = 1000)]
    pub report_ms: u64,
}

impl ClientOptions {
    /// Requests to this URL, 50 per second, until stopped.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: Some(url.into()),
            rate: 50,
            timeout_ms: 500,
            hold: 0,
            hold_address: None,
            hold_pause_ms: 100,
            hold_timeout_ms: 15_000,
            duration_ms: None,
            report_ms: 200,
        }
    }

    /// New connections per second.
    pub fn rate(mut self, per_second: u32) -> Self {
        self.rate = per_second;
        self
    }

    /// How long one request may take.
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.timeout_ms = millis(limit);
        self
    }

    /// Also keeps `count` long-lived connections to an echo service.
    pub fn hold(mut self, count: u32, address: SocketAddr) -> Self {
        self.hold = count;
        self.hold_address = Some(address);
        self
    }

    /// Stops by itself after this long.
    pub fn duration(mut self, duration: Duration) -> Self {
        self.duration_ms = Some(millis(duration));
        self
    }

    /// The command line that says the same.
    pub fn to_args(&self) -> Vec<String> {
        let mut args = Vec::new();
        let mut say = |flag: &str, value: String| args.extend([format!("--{flag}"), value]);
        if let Some(url) = &self.url {
            say("url", url.clone());
        }
        say("rate", self.rate.to_string());
        say("timeout-ms", self.timeout_ms.to_string());
        say("hold", self.hold.to_string());
        if let Some(address) = self.hold_address {
            say("hold-address", address.to_string());
        }
        say("hold-pause-ms", self.hold_pause_ms.to_string());
        say("hold-timeout-ms", self.hold_timeout_ms.to_string());
        if let Some(duration) = self.duration_ms {
            say("duration-ms", duration.to_string());
        }
        say("report-ms", self.report_ms.to_string());
        args
    }
}

/// Splits `http://<address>[:port][/path]` into where to connect and what to ask for.
///
/// # Errors
/// Says what is wrong with it; names are not resolved here.
pub fn parse_url(url: &str) -> Result<(SocketAddr, String), String> {
    let wrong = |what: &str| format!("URL {url:?}: {what}, use http://<address>[:port][/path]");
    let uri: hyper::Uri = url.parse().map_err(|e| wrong(&format!("{e}")))?;
    if uri.scheme_str() != Some("http") {
        return Err(wrong("the scheme is not http"));
    }
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let address = host.parse().map_err(|_| wrong("the host is no IP address"))?;
    let path = uri.path_and_query().map_or("/", |p| p.as_str()).to_string();
    Ok((SocketAddr::new(address, uri.port_u16().unwrap_or(80)), path))
}

/// Runs until its time is over or it is told to stop, then waits for what is in flight and writes the summary.
///
/// # Errors
/// When an option makes no sense, or standard output is gone.
pub async fn client(options: ClientOptions) -> anyhow::Result<()> {
    LocalSet::new().run_until(run(options)).await
}

/// The end of one request.
type Outcome = Result<Backend, (Reason, String)>;

async fn run(options: ClientOptions) -> anyhow::Result<()> {
    let target = options.url.as_deref().map(parse_url).transpose().map_err(anyhow::Error::msg)?;
    anyhow::ensure!(options.rate > 0 && options.rate <= 10_000, "--rate must be from 1 to 10000 per second");
    let limit = Duration::from_millis(options.timeout_ms);
    let start = Instant::now();
    let mut tally = Tally::default();
    let held = Rc::new(RefCell::new(Holding::new(start, options.hold)));
    // Dropping the set at the end closes the long-lived connections; their end is then not counted.
    let mut holders = JoinSet::new();
    if options.hold > 0 {
        let address = options.hold_address.context("--hold needs --hold-address")?;
        for number in 0..options.hold {
            holders.spawn_local(hold(Rc::clone(&held), number, address, options.clone()));
        }
    }

    let mut requests: JoinSet<Outcome> = JoinSet::new();
    let mut pace = interval(Duration::from_secs(1) / options.rate);
    // After a stall of this machine the missed requests are left out: a burst would measure the burst.
    pace.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut reports = interval(Duration::from_millis(options.report_ms.max(10)));
    reports.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut stop = Box::pin(stop(options.duration_ms.map(Duration::from_millis))?);
    let mut stopping = false;
    loop {
        tokio::select! {
            biased;
            () = &mut stop, if !stopping => stopping = true,
            Some(ended) = requests.join_next() => {
                // A panicking request would otherwise vanish from the books.
                let outcome = ended.unwrap_or_else(|e| Err((Reason::Other, e.to_string())));
                match outcome {
                    Ok(backend) => tally.succeeded(start.elapsed(), backend),
                    Err((reason, detail)) => {
                        tally.failed(reason);
                        say(&LoadEvent::Failed { at_ms: millis(start.elapsed()), reason, detail })?;
                    }
                }
            }
            _ = pace.tick(), if !stopping && target.is_some() => {
                if let Some((to, path)) = target.clone() {
                    tally.started();
                    requests.spawn_local(one_request(to, path, limit));
                }
            }
            _ = reports.tick(), if !stopping => {
                let totals = tally.totals(start.elapsed(), held.borrow().counts());
                say(&LoadEvent::Tick(totals))?;
            }
            else => {}
        }
        if stopping && tally.in_flight() == 0 {
            break;
        }
    }
    let counts = held.borrow().counts();
    drop(holders);
    say(&LoadEvent::Summary(tally.totals(start.elapsed(), counts)))
}

/// Resolves when the run shall end.
fn stop(duration: Option<Duration>) -> io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        let over = async {
            match duration {
                Some(duration) => tokio::time::sleep(duration).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = over => {}
        }
    })
}

/// A request on a connection of its own; both share the limit.
async fn one_request(to: SocketAddr, path: String, limit: Duration) -> Outcome {
    let start = Instant::now();
    let stream = match timeout(limit, TcpStream::connect(to)).await {
        Err(_) => return Err((Reason::ConnectTimeout, format!("no handshake within {limit:?}"))),
        Ok(Err(error)) => return Err((connect_reason(&error), error.to_string())),
        Ok(Ok(stream)) => stream,
    };
    let left = limit.saturating_sub(start.elapsed());
    match timeout(left, request(stream, to, &path)).await {
        Err(_) => Err((Reason::AnswerTimeout, format!("connected, but no answer within {limit:?}"))),
        Ok(Err(error)) => Err((Reason::Broken, error_chain(&error))),
        Ok(Ok(response)) => match response.backend {
            Some(backend) if response.status == 200 => Ok(backend),
            _ => Err((Reason::WrongAnswer, format!("status {} and {:?}", response.status, response.body))),
        },
    }
}

fn connect_reason(error: &io::Error) -> Reason {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Reason::Refused,
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Reason::Unreachable,
        io::ErrorKind::TimedOut => Reason::ConnectTimeout,
        io::ErrorKind::ConnectionReset => Reason::Broken,
        _ => Reason::Other,
    }
}

fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// The state that all long-lived connections share; they run on one thread.
struct Holding {
    start: Instant,
    counts: Held,
    /// When the pending echo of each connection was sent.
    pending: Vec<Option<Instant>>,
}

impl Holding {
    fn new(start: Instant, wanted: u32) -> Self {
        let counts = Held { wanted: u64::from(wanted), ..Held::default() };
        Self { start, counts, pending: vec![None; wanted as usize] }
    }

    fn counts(&self) -> Held {
        let waiting = self.pending.iter().flatten().map(|since| millis(since.elapsed())).max().unwrap_or(0);
        Held { longest_stall_ms: self.counts.longest_stall_ms.max(waiting), ..self.counts }
    }

    /// A connection ended by itself after so many echoes.
    fn ended(&mut self, number: u32, echoes: u64, detail: String) {
        self.pending[number as usize] = None;
        if echoes == 0 {
            // Never worked, so it is no connection that was lost.
            self.counts.open_failures += 1;
            return;
        }
        self.counts.broken += 1;
        self.counts.open -= 1;
        let at_ms = millis(self.start.elapsed());
        // Without a reader there is nobody to tell; the next line of the main loop ends the program.
        let _ = say(&LoadEvent::HeldBroken { at_ms, connection: number, echoes, detail });
    }

    fn echoed(&mut self, number: u32) {
        self.counts.echoes += 1;
        if let Some(since) = self.pending[number as usize].take() {
            self.counts.longest_stall_ms = self.counts.longest_stall_ms.max(millis(since.elapsed()));
        }
    }
}

/// Keeps one connection alive for ever, opening a new one whenever it ends.
async fn hold(shared: Rc<RefCell<Holding>>, number: u32, to: SocketAddr, options: ClientOptions) {
    let limit = Duration::from_millis(options.timeout_ms);
    let pause = Duration::from_millis(options.hold_pause_ms);
    loop {
        let stream = match timeout(limit, TcpStream::connect(to)).await {
            Ok(Ok(stream)) => stream,
            _ => {
                shared.borrow_mut().counts.open_failures += 1;
                tokio::time::sleep(pause).await;
                continue;
            }
        };
        let (echoes, detail) = keep_echoing(&shared, number, stream, &options).await;
        shared.borrow_mut().ended(number, echoes, detail);
        tokio::time::sleep(pause).await;
    }
}

/// Sends numbered lines and waits for each to come back. Returns how many did, and what ended it.
async fn keep_echoing(
    shared: &Rc<RefCell<Holding>>,
    number: u32,
    stream: TcpStream,
    options: &ClientOptions,
) -> (u64, String) {
    let limit = Duration::from_millis(options.hold_timeout_ms);
    let pause = Duration::from_millis(options.hold_pause_ms);
    let _ = stream.set_nodelay(true);
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let mut echoes = 0;
    let mut line = String::new();
    loop {
        let sent = format!("{number} {echoes}\n");
        shared.borrow_mut().pending[number as usize] = Some(Instant::now());
        line.clear();
        let exchange = async {
            writer.write_all(sent.as_bytes()).await?;
            reader.read_line(&mut line).await
        };
        let problem = match timeout(limit, exchange).await {
            Err(_) => Some(format!("no echo within {limit:?}")),
            Ok(Err(error)) => Some(error.to_string()),
            Ok(Ok(0)) => Some("closed by the other side".to_string()),
            Ok(Ok(_)) if line != sent => Some(format!("sent {sent:?}, got {line:?}")),
            Ok(Ok(_)) => None,
        };
        if let Some(problem) = problem {
            return (echoes, problem);
        }
        echoes += 1;
        {
            let mut holding = shared.borrow_mut();
            holding.echoed(number);
            if echoes == 1 {
                holding.counts.opened += 1;
                holding.counts.open += 1;
            }
        }
        tokio::time::sleep(pause).await;
    }
}
