//! The life of one watch: list, follow, recover.
//!
//! ```text
//! Start ─► Streaming ─┐            streaming list: the server sends the list as events and a bookmark at its end
//!   │ refused         ├─► Listed ─► Following ─► Listed …      a watch ends every few minutes, and goes on where it was
//!   └────► Pages ─────┘       └── 410 Gone ──► Start
//! ```
//! Every failure waits with back-off and jitter; nothing is said to be complete before it was read completely.

use std::collections::{BTreeSet, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{AsyncBufRead, AsyncBufReadExt, StreamExt};
use kinesin_core::objects::ObjectKey;
use kube::api::{ListParams, WatchParams};
use rand::Rng;
use smol_str::SmolStr;
use tokio::time::Instant;

use super::Shared;
use super::servers::{CallError, Class};
use super::wire::{self, Bad, Kind, Line};
use crate::source::{Event, Events};

/// First and longest pause after failures.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(15));
/// Pause while a kind is not installed (its CRD is about to be).
const NOT_INSTALLED: Duration = Duration::from_millis(if cfg!(test) { 100 } else { 3_000 });
/// Servers that do not know streaming lists send the objects and then nothing; this much of nothing means that.
const STREAMING_SILENCE: Duration = Duration::from_millis(if cfg!(test) { 1_000 } else { 10_000 });
/// How long the server keeps a watch open, before the jitter that keeps thousands of agents apart.
const WATCH_SECONDS: std::ops::Range<u32> = 240..290;
/// A watch that says nothing for this much longer than that is dead, whatever TCP thinks.
const WATCH_GRACE: Duration = Duration::from_secs(10);
/// Objects per page where lists come in pages.
const PAGE: u32 = 500;
/// A line longer than this is no object: etcd takes 1.5 MiB.
const LINE_LIMIT: usize = 16 << 20;

type Lines = Pin<Box<dyn AsyncBufRead + Send>>;

enum Phase {
    Start,
    Pages { next: String, first: bool },
    Streaming { lines: Lines },
    Listed { version: SmolStr },
    Following { version: SmolStr, lines: Lines, idle: Duration, since: Instant },
    Waiting { then: Box<Phase>, wait: Duration, any_success_helps: bool },
}

struct Watcher<T> {
    shared: Arc<Shared>,
    path: String,
    selection: Selection,
    phase: Phase,
    streaming: bool,
    queue: VecDeque<Event<T>>,
    failures: u32,
    /// The last failure was that nobody answered.
    unreachable: bool,
    told: Option<String>,
    broken: BTreeSet<ObjectKey>,
    buffer: Vec<u8>,
}

/// What a watch ended with.
enum Ended {
    Closed,
    Silent,
    Failed(String),
}

/// Which of the objects at a path are followed, by the API's selectors; all of them without.
#[derive(Clone, Default)]
pub(super) struct Selection {
    pub(super) labels: Option<String>,
    pub(super) fields: Option<String>,
}

/// Follows the selected objects at `path`.
pub(super) fn events<T: Kind>(shared: Arc<Shared>, path: String, selection: Selection) -> Events<T> {
    let watcher = Watcher {
        shared,
        path,
        selection,
        phase: Phase::Start,
        streaming: true,
        queue: VecDeque::new(),
        failures: 0,
        unreachable: false,
        told: None,
        broken: BTreeSet::new(),
        buffer: Vec::new(),
    };
    futures::stream::unfold(watcher, |mut watcher: Watcher<T>| async move {
        loop {
            if let Some(event) = watcher.queue.pop_front() {
                return Some((event, watcher));
            }
            watcher.step().await;
        }
    })
    .boxed()
}

impl<T: Kind> Watcher<T> {
    async fn step(&mut self) {
        self.phase = match std::mem::replace(&mut self.phase, Phase::Start) {
            Phase::Start if self.streaming => self.start_streaming().await,
            Phase::Start => Phase::Pages { next: String::new(), first: true },
            Phase::Pages { next, first } => self.page(next, first).await,
            Phase::Streaming { lines } => self.stream(lines).await,
            Phase::Listed { version } => self.follow(version).await,
            Phase::Following { version, lines, idle, since } => self.following(version, lines, idle, since).await,
            Phase::Waiting { then, wait, any_success_helps } => {
                pause(&self.shared, wait, any_success_helps).await;
                *then
            }
        };
    }

    fn watch_params(&self, streaming: bool) -> WatchParams {
        WatchParams {
            label_selector: self.selection.labels.clone(),
            field_selector: self.selection.fields.clone(),
            timeout: Some(rand::rng().random_range(WATCH_SECONDS)),
            bookmarks: true,
            send_initial_events: streaming,
        }
    }

    async fn open(&mut self, streaming: bool, version: &str) -> Result<(Lines, Duration), CallError> {
        let params = self.watch_params(streaming);
        let idle = Duration::from_secs(u64::from(params.timeout.unwrap_or(WATCH_SECONDS.end))) + WATCH_GRACE;
        let request = kube::core::Request::new(self.path.as_str())
            .watch(&params, version)
            .map_err(|error| CallError::Transport(error.to_string()))?;
        self.buffer.clear();
        let lines = self.shared.servers.open(request).await?;
        Ok((Box::pin(lines), idle))
    }

    async fn start_streaming(&mut self) -> Phase {
        // An empty version asks for the newest state: a lagging server must not take the world back in time.
        match self.open(true, "").await {
            Ok((lines, _)) => {
                self.begin_list();
                Phase::Streaming { lines }
            }
            Err(CallError::Answer(status)) if matches!(status.code, 400 | 422) => {
                tracing::debug!(kind = T::KIND, "server has no streaming lists, listing in pages");
                self.streaming = false;
                Phase::Start
            }
            Err(error) => self.retry(error, Phase::Start),
        }
    }

    fn begin_list(&mut self) {
        for key in std::mem::take(&mut self.broken) {
            self.shared.servers.set_problem(T::KIND, key.to_string(), None);
        }
        self.queue.push_back(Event::Init);
    }

    fn end_list(&mut self) {
        self.succeeded();
        self.queue.push_back(Event::InitDone);
    }

    async fn stream(&mut self, mut lines: Lines) -> Phase {
        match self.next_line(&mut lines, STREAMING_SILENCE).await {
            Ok(()) => {}
            Err(Ended::Silent) => {
                tracing::debug!(kind = T::KIND, "streaming list has no end, listing in pages");
                self.streaming = false;
                return Phase::Start;
            }
            Err(Ended::Closed) => {
                let error = CallError::Transport("the list broke off".to_owned());
                return self.retry(error, Phase::Start);
            }
            Err(Ended::Failed(error)) => return self.retry(CallError::Transport(error), Phase::Start),
        }
        match self.take_line() {
            Line::Added(object) => {
                self.arrived(&object);
                self.queue.push_back(Event::InitApply(object));
            }
            Line::Bad { bad, .. } => self.report(bad),
            // Between the list and its bookmark nothing is deleted by the server's word, but it costs nothing to be exact.
            Line::Deleted { key, .. } => self.deleted(key),
            Line::Bookmark { version, ends_list: true } => {
                self.end_list();
                let idle = Duration::from_secs(u64::from(WATCH_SECONDS.end)) + WATCH_GRACE;
                return Phase::Following { version, lines, idle, since: Instant::now() };
            }
            Line::Bookmark { .. } => {}
            Line::Error(status) => return self.retry(CallError::Answer(status), Phase::Start),
            Line::Noise(text) => return self.retry(CallError::Transport(text), Phase::Start),
        }
        Phase::Streaming { lines }
    }

    async fn page(&mut self, next: String, first: bool) -> Phase {
        let params = ListParams {
            label_selector: self.selection.labels.clone(),
            field_selector: self.selection.fields.clone(),
            limit: Some(PAGE),
            continue_token: Some(next.clone()).filter(|token| !token.is_empty()),
            ..ListParams::default()
        };
        let answer = match kube::core::Request::new(self.path.as_str()).list(&params) {
            Ok(request) => self.shared.servers.call(Class::Read, request).await,
            Err(error) => Err(CallError::Transport(error.to_string())),
        };
        let text = match answer {
            Ok(text) => text,
            // The list grew too old between two pages.
            Err(CallError::Answer(status)) if status.code == 410 && !first => {
                return Phase::Pages { next: String::new(), first: true };
            }
            Err(error) => return self.retry(error, Phase::Pages { next, first }),
        };
        let page = match wire::page::<T>(&text) {
            Ok(page) => page,
            Err(error) => {
                let error = CallError::Transport(format!("the list is not JSON of a list: {error}"));
                return self.retry(error, Phase::Start);
            }
        };
        if first {
            self.begin_list();
        }
        for object in page.objects {
            self.arrived(&object);
            self.queue.push_back(Event::InitApply(object));
        }
        page.bad.into_iter().for_each(|bad| self.report(bad));
        if !page.next.is_empty() {
            return Phase::Pages { next: page.next, first: false };
        }
        self.end_list();
        Phase::Listed { version: page.version }
    }

    async fn follow(&mut self, version: SmolStr) -> Phase {
        match self.open(false, &version).await {
            Ok((lines, idle)) => {
                self.succeeded();
                Phase::Following { version, lines, idle, since: Instant::now() }
            }
            Err(CallError::Answer(status)) if status.code == 410 => Phase::Start,
            Err(error) => self.retry(error, Phase::Listed { version }),
        }
    }

    async fn following(&mut self, mut version: SmolStr, mut lines: Lines, idle: Duration, since: Instant) -> Phase {
        match self.next_line(&mut lines, idle).await {
            Ok(()) => {}
            // The end of a watch is the most ordinary thing, clean or not: whether the server is there shows at the next one.
            Err(_) if since.elapsed() > BACKOFF.0 => return Phase::Listed { version },
            Err(_) => {
                let then = Box::new(Phase::Listed { version });
                return Phase::Waiting { then, wait: BACKOFF.0, any_success_helps: false };
            }
        }
        match self.take_line() {
            Line::Added(object) => {
                if !object.meta().resource_version.is_empty() {
                    version = object.meta().resource_version.clone();
                }
                self.arrived(&object);
                self.queue.push_back(Event::Apply(object));
            }
            Line::Deleted { key, version: at } => {
                if !at.is_empty() {
                    version = at;
                }
                self.deleted(key);
            }
            Line::Bookmark { version: at, .. } if !at.is_empty() => version = at,
            Line::Bookmark { .. } => {}
            Line::Bad { bad, version: at } => {
                if !at.is_empty() {
                    version = at;
                }
                self.report(bad);
            }
            Line::Error(status) if status.code == 410 => {
                // A server that says so again and again must not be asked again and again at once.
                return Phase::Waiting { then: Box::new(Phase::Start), wait: BACKOFF.0, any_success_helps: false };
            }
            Line::Error(status) => return self.retry(CallError::Answer(status), Phase::Listed { version }),
            Line::Noise(text) => return self.retry(CallError::Transport(text), Phase::Listed { version }),
        }
        Phase::Following { version, lines, idle, since }
    }

    /// Reads a whole line into the buffer. What was read of one stays when this is dropped in between.
    async fn next_line(&mut self, lines: &mut Lines, idle: Duration) -> Result<(), Ended> {
        loop {
            let chunk = match tokio::time::timeout(idle, lines.fill_buf()).await {
                Err(_) => return Err(Ended::Silent),
                Ok(Err(error)) => return Err(Ended::Failed(format!("the watch broke off: {error}"))),
                Ok(Ok([])) => return Err(Ended::Closed),
                Ok(Ok(chunk)) => chunk,
            };
            let end = chunk.iter().position(|byte| *byte == b'\n');
            let taken = end.map_or(chunk.len(), |end| end + 1);
            self.buffer.extend_from_slice(&chunk[..taken]);
            lines.consume_unpin(taken);
            if self.buffer.len() > LINE_LIMIT {
                self.buffer = Vec::new();
                return Err(Ended::Failed("a line of the watch is longer than any object".to_owned()));
            }
            if end.is_some() {
                if self.buffer.iter().all(u8::is_ascii_whitespace) {
                    self.buffer.clear();
                    continue;
                }
                return Ok(());
            }
        }
    }

    fn take_line(&mut self) -> Line<T> {
        let line = wire::line::<T>(&self.buffer);
        self.buffer.clear();
        line
    }

    fn arrived(&mut self, object: &T) {
        if !self.broken.is_empty() && self.broken.remove(&object.key()) {
            self.shared.servers.set_problem(T::KIND, object.key().to_string(), None);
        }
        object.remember_conditions(&self.shared);
    }

    fn deleted(&mut self, key: ObjectKey) {
        if self.broken.remove(&key) {
            self.shared.servers.set_problem(T::KIND, key.to_string(), None);
        }
        self.shared.conditions().forget(T::KIND, &key);
        self.queue.push_back(Event::Delete(key));
    }

    fn report(&mut self, bad: Bad) {
        self.shared.servers.set_problem(T::KIND, bad.key.to_string(), Some(bad.text.clone()));
        self.broken.insert(bad.key);
        self.queue.push_back(Event::Problem(bad.text));
    }

    fn succeeded(&mut self) {
        self.failures = 0;
        if self.told.take().is_some() {
            self.shared.servers.set_problem(T::KIND, String::new(), None);
        }
    }

    /// Says what is wrong (once), then waits, then goes on with `phase`.
    fn retry(&mut self, error: CallError, phase: Phase) -> Phase {
        // A server that answers again after an outage says no for a moment (its authorizer and caches are still empty):
        // how long it was away must not count against that.
        let unreachable = matches!(error, CallError::Transport(_));
        if std::mem::replace(&mut self.unreachable, unreachable) && !unreachable {
            self.failures = 0;
        }
        let (text, wait, any_success_helps) = match &error {
            CallError::Answer(status) if status.code == 404 => {
                let text = format!("{}: not served at {}; is its CRD installed?", T::KIND, self.path);
                (text, NOT_INSTALLED, false)
            }
            CallError::Answer(status) if matches!(status.code, 401 | 403) => {
                let text = format!("{}: {}; check the agent's ClusterRole", T::KIND, status.message);
                (text, self.backoff(), false)
            }
            CallError::Answer(status) => {
                let asked = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
                let wait = self.backoff().max(Duration::from_secs(u64::from(asked.min(60))));
                (format!("{}: {} ({})", T::KIND, status.message, status.code), wait, true)
            }
            CallError::Transport(message) => (format!("{}: {message}", T::KIND), self.backoff(), true),
        };
        if self.told.as_ref() != Some(&text) {
            self.shared.servers.set_problem(T::KIND, String::new(), Some(text.clone()));
            self.queue.push_back(Event::Problem(text.clone()));
            self.told = Some(text);
        }
        Phase::Waiting { then: Box::new(phase), wait, any_success_helps }
    }

    /// Exponential; the first failures are quick while there are other servers to try.
    fn backoff(&mut self) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let others = u32::try_from(self.shared.servers.count() - 1).unwrap_or(u32::MAX);
        let doublings = self.failures.saturating_sub(others).clamp(1, 16) - 1;
        (BACKOFF.0 * 2u32.pow(doublings)).min(BACKOFF.1)
    }
}

/// Waits for half to one and a half of `wait`, or until another call found that the servers are back.
async fn pause(shared: &Shared, wait: Duration, any_success_helps: bool) {
    let jitter: f64 = rand::rng().random_range(0.5..1.5);
    let recovered = shared.servers.recovered.notified();
    tokio::select! {
        () = tokio::time::sleep(wait.mul_f64(jitter)) => {}
        () = recovered, if any_success_helps => tokio::time::sleep(BACKOFF.0.mul_f64(jitter)).await,
    }
}
