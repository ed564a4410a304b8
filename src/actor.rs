//! What every actor of the agent has in common: one shell around ractor that counts, times, and can be told to panic.
//!
//! An actor here is its own state: [`Actor::start`] rebuilds it from its restart story, [`Actor::handle`] changes it,
//! [`Actor::stop`] releases what is exclusive. The shell keeps ractor's semantics (one message at a time, unwinding
//! panics, linked supervision) and adds the uniform metrics; see docs/adr/0002.
//!
//! Deliberately absent: state that survives a failure. A failed instance is dropped whole.

use std::future::Future;
use std::marker::PhantomData;
use std::sync::atomic::Ordering;
use std::time::Instant;

use metrics::{counter, histogram};
use ractor::{ActorProcessingErr, ActorRef};

use crate::address::{Address, Envelope, Label};

/// Why an actor wants to be restarted; the text goes to the log, to `kinesin tree` and to the supervisor.
pub type Failure = anyhow::Error;

/// An actor's behaviour. The implementing type is the state of one instance.
pub trait Actor: Send + Sized + 'static {
    /// What it hears: at most eight variants.
    type Msg: Label + Send + 'static;
    /// All it takes to start again.
    type Args: Send + 'static;

    /// Rebuilds the state. Cheap, or it keeps its supervisor waiting; may refuse.
    fn start(args: Self::Args, me: Address<Self::Msg>) -> impl Future<Output = Result<Self, Failure>> + Send;

    /// Handles one message. `Err` means "restart me".
    fn handle(&mut self, message: Self::Msg) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Runs on an orderly stop, not after a failure: releases what is exclusive.
    fn stop(&mut self) -> impl Future<Output = ()> + Send {
        async {}
    }
}

/// The ractor actor that runs an [`Actor`].
pub(crate) struct Shell<A>(PhantomData<fn() -> A>);

impl<A> Default for Shell<A> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

/// State of the shell: the actor and where it lives.
pub(crate) struct Running<A: Actor> {
    actor: A,
    address: Address<A::Msg>,
}

impl<A: Actor> Drop for Running<A> {
    fn drop(&mut self) {
        self.address.stats().stopped();
    }
}

impl<A: Actor> ractor::Actor for Shell<A> {
    type Msg = Envelope<A::Msg>;
    type State = Running<A>;
    type Arguments = (A::Args, Address<A::Msg>);

    async fn pre_start(
        &self,
        me: ActorRef<Self::Msg>,
        (args, address): Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        address.stats().started();
        // Before `start`, so that subscriptions made there can already wake this instance.
        address.moved_to(Some(me));
        match A::start(args, address.clone()).await {
            Ok(actor) => Ok(Running { actor, address }),
            Err(error) => {
                let text = format!("{error:#}");
                address.stats().failed(text.clone());
                address.stats().stopped();
                Err(text.into())
            }
        }
    }

    async fn handle(
        &self,
        _: ActorRef<Self::Msg>,
        envelope: Self::Msg,
        running: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        let Running { actor, address } = running;
        let (message, sent) = match envelope {
            Envelope::Deliver(message, sent) => (message, sent),
            Envelope::Die => panic!("told to by `kinesin debug kill`"),
        };
        let stats = address.stats().clone();
        stats.depth.fetch_sub(1, Ordering::Relaxed);
        let (name, label) = (address.name(), message.label());
        let begun = Instant::now();
        histogram!("kinesin_actor_queue_seconds", "actor" => name).record(begun.duration_since(sent));
        let result = actor.handle(message).await;
        let took = begun.elapsed();
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        stats.messages.fetch_add(1, Ordering::Relaxed);
        stats.busy_nanos.fetch_add(nanos, Ordering::Relaxed);
        stats.longest_nanos.fetch_max(nanos, Ordering::Relaxed);
        counter!("kinesin_actor_messages_total", "actor" => name, "msg" => label).increment(1);
        histogram!("kinesin_actor_handle_seconds", "actor" => name).record(took);
        result.map_err(|error| {
            let text = format!("{error:#}");
            stats.failed(text.clone());
            ActorProcessingErr::from(Failed(text))
        })
    }

    async fn post_stop(&self, _: ActorRef<Self::Msg>, running: &mut Self::State) -> Result<(), ActorProcessingErr> {
        running.actor.stop().await;
        Ok(())
    }
}

/// Marks a failure that a handler returned, as opposed to a panic.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Failed(String);
