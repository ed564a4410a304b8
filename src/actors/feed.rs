//! From a source's event stream to a table: what all watchers share.
//!
//! The stream is applied by a task of the watcher, not through its mailbox: a list of 5,000 objects is 5,000 table writes
//! and one message. The task dies with the actor, and tells it when it ends by itself.
//!
//! Deliberately absent: a list of what is wrong with the input. The source keeps it, because only the source knows when
//! something is right again; here it is logged.

use futures::StreamExt;
use kinesin_core::objects::{Object, ObjectKey};
use metrics::counter;

use crate::actor::{Actor, Failure};
use crate::address::{Address, Label};
use crate::source::{Event, Events};
use crate::table::{Listing, Table};

/// What a watcher hears from its stream.
pub enum WatcherMsg {
    /// A complete list has been applied.
    Listed,
    /// Something could not be read; the last good state stays.
    Problem(String),
    /// The stream ended, which no stream should.
    Ended,
}

impl Label for WatcherMsg {
    fn label(&self) -> &'static str {
        match self {
            Self::Listed => "Listed",
            Self::Problem(_) => "Problem",
            Self::Ended => "Ended",
        }
    }
}

/// Follows one kind of object.
pub struct Watcher<T: Object> {
    table: Table<ObjectKey, T>,
    pump: tokio::task::JoinHandle<()>,
}

/// What a watcher needs: how to open the stream, and where objects go.
pub struct WatcherArgs<T: Object> {
    /// A freshly opened stream.
    pub events: Events<T>,
    /// Written by this watcher alone.
    pub table: Table<ObjectKey, T>,
}

impl<T: Object> Actor for Watcher<T> {
    type Msg = WatcherMsg;
    type Args = WatcherArgs<T>;

    async fn start(args: Self::Args, me: Address<WatcherMsg>) -> Result<Self, Failure> {
        let WatcherArgs { events, table } = args;
        let pump = tokio::spawn(pump(events, table.clone(), me));
        Ok(Self { table, pump })
    }

    async fn handle(&mut self, message: WatcherMsg) -> Result<(), Failure> {
        match message {
            WatcherMsg::Listed => {
                tracing::info!(kind = T::KIND, objects = self.table.len(), "list complete");
            }
            WatcherMsg::Problem(problem) => tracing::warn!(kind = T::KIND, problem, "problem"),
            WatcherMsg::Ended => anyhow::bail!("the stream of {} ended", T::PLURAL),
        }
        Ok(())
    }
}

impl<T: Object> Drop for Watcher<T> {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

async fn pump<T: Object>(mut events: Events<T>, table: Table<ObjectKey, T>, me: Address<WatcherMsg>) {
    let _ended = Ended(me.clone());
    let mut listing: Option<Listing<ObjectKey>> = None;
    while let Some(event) = events.next().await {
        let action = match event {
            Event::Init => {
                listing = Some(Listing::begin());
                "list"
            }
            Event::InitApply(object) => {
                let key = object.key();
                match &mut listing {
                    Some(listing) => listing.put(&table, key, object),
                    None => drop(table.put(key, object)),
                }
                received::<T>("update", true, false);
                "list_item"
            }
            Event::InitDone => {
                if let Some(listing) = listing.take() {
                    listing.finish(&table);
                }
                me.cast(WatcherMsg::Listed);
                "list_done"
            }
            Event::Apply(object) => {
                let key = object.key();
                let action = if table.get(&key).is_some() { "update" } else { "create" };
                let changed = table.put(key, object);
                received::<T>(action, true, !changed);
                "apply"
            }
            Event::Delete(key) => {
                table.remove(&key);
                received::<T>("delete", true, false);
                "delete"
            }
            Event::Problem(problem) => {
                received::<T>("update", false, false);
                me.cast(WatcherMsg::Problem(problem));
                "problem"
            }
        };
        counter!("kinesin_source_events_total", "kind" => T::PLURAL, "action" => action).increment(1);
    }
}

/// Counts an event as Cilium's dashboards have it. What a list repeats counts as updates that change something.
fn received<T: Object>(action: &'static str, valid: bool, equal: bool) {
    let said = |yes: bool| if yes { "true" } else { "false" };
    let validity = if valid { "valid" } else { "invalid" };
    counter!("cilium_kubernetes_events_received_total", "scope" => T::KIND, "action" => action, "validity" => validity, "equal" => said(equal))
        .increment(1);
    let outcome = if valid { "success" } else { "fail" };
    counter!("cilium_kubernetes_events_total", "scope" => T::KIND, "action" => action, "outcome" => outcome)
        .increment(1);
}

/// Tells the watcher when its stream ends or its task panics.
struct Ended(Address<WatcherMsg>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.cast(WatcherMsg::Ended);
    }
}
