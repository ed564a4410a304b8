use std::sync::Mutex;

use super::*;
use crate::actor::Failure;

type Log = Arc<Mutex<Vec<String>>>;

enum ProbeMsg {
    Fail,
    Panic,
    Noop,
}

impl Label for ProbeMsg {
    fn label(&self) -> &'static str {
        "Probe"
    }
}

/// Writes down what happens to it.
struct Probe {
    name: &'static str,
    log: Log,
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.log.lock().unwrap().push(format!("{} dropped", self.name));
    }
}

impl Actor for Probe {
    type Msg = ProbeMsg;
    type Args = (&'static str, Log, Arc<Mutex<bool>>);

    async fn start((name, log, refuse): Self::Args, _: Address<ProbeMsg>) -> Result<Self, Failure> {
        anyhow::ensure!(!*refuse.lock().unwrap(), "refused");
        log.lock().unwrap().push(format!("{name} up"));
        Ok(Self { name, log })
    }

    async fn handle(&mut self, message: ProbeMsg) -> Result<(), Failure> {
        match message {
            ProbeMsg::Fail => anyhow::bail!("boom"),
            ProbeMsg::Panic => panic!("bang"),
            ProbeMsg::Noop => Ok(()),
        }
    }

    async fn stop(&mut self) {
        self.log.lock().unwrap().push(format!("{} stop", self.name));
    }
}

struct Fixture {
    tree: Tree,
    addresses: Vec<Address<ProbeMsg>>,
    log: Log,
    refuse: Arc<Mutex<bool>>,
}

fn policy(strategy: Strategy) -> Policy {
    let backoff = Backoff { min: Duration::from_millis(20), max: Duration::from_millis(80) };
    Policy { strategy, max_restarts: 4, within: Duration::from_secs(60), backoff, grace: Duration::from_secs(1) }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waited = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), waited).await.unwrap_or_else(|_| panic!("never: {what}"));
}

async fn fixture(policy: Policy, refuse: bool) -> Fixture {
    let log = Log::default();
    let refuse = Arc::new(Mutex::new(refuse));
    let addresses: Vec<_> = ["a", "b", "c"].into_iter().map(Address::new).collect();
    let children = addresses
        .iter()
        .map(|address| {
            let (name, log, refuse) = (address.name(), log.clone(), refuse.clone());
            Child::actor::<Probe>(address, move || (name, log.clone(), refuse.clone()))
        })
        .collect();
    let tree = Tree::start(Child::supervisor("root", policy, children)).await.unwrap();
    if !*refuse.lock().unwrap() {
        until("all up", || addresses.iter().all(|a| a.stats().uptime().is_some() && a.cast(ProbeMsg::Noop))).await;
        until("all answer", || {
            addresses.iter().all(|a| a.stats().depth.load(std::sync::atomic::Ordering::Relaxed) == 0)
        })
        .await;
        log.lock().unwrap().clear();
    }
    Fixture { tree, addresses, log, refuse }
}

impl Fixture {
    async fn log_reaches(&self, lines: usize) -> Vec<String> {
        until("the log grows", || self.log.lock().unwrap().len() >= lines).await;
        std::mem::take(&mut *self.log.lock().unwrap())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_for_one_restarts_only_the_failed_child_after_its_state_is_gone() {
    let f = fixture(policy(Strategy::OneForOne), false).await;
    for message in [ProbeMsg::Fail, ProbeMsg::Panic] {
        f.addresses[1].cast(message);
        assert_eq!(f.log_reaches(2).await, ["b dropped", "b up"]);
    }
    let stats = f.addresses[1].stats();
    let counted = |cause| stats.restarts[cause as usize].load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!((counted(Cause::Error), counted(Cause::Panic), stats.total_restarts()), (1, 1, 2));
    let log = f.log.clone();
    f.tree.stop().await;
    let log: Vec<_> = log.lock().unwrap().iter().filter(|line| line.ends_with("stop")).cloned().collect();
    assert_eq!(log, ["c stop", "b stop", "a stop"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rest_for_one_takes_later_siblings_down_in_reverse_and_up_in_order() {
    let f = fixture(policy(Strategy::RestForOne), false).await;
    f.addresses[0].cast(ProbeMsg::Fail);
    let seen = f.log_reaches(8).await;
    assert_eq!(seen[0], "a dropped");
    let of = |suffix: &str| seen.iter().filter(|l| l.ends_with(suffix)).cloned().collect::<Vec<_>>();
    assert_eq!(of("stop"), ["c stop", "b stop"]);
    assert_eq!(of("up"), ["a up", "b up", "c up"]);
    assert_eq!(f.addresses[2].stats().restarts[Cause::Sibling as usize].load(std::sync::atomic::Ordering::Relaxed), 1);
    f.tree.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn debug_kill_panics_the_actor_for_real_and_it_comes_back() {
    let f = fixture(policy(Strategy::OneForOne), false).await;
    assert_eq!(f.tree.root().find("c").unwrap().kill(), Some(true));
    assert_eq!(f.log_reaches(2).await, ["c dropped", "c up"]);
    assert!(f.addresses[2].stats().last_error().unwrap().contains("debug kill"));
    f.tree.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_fails_too_often_escalates_and_the_others_stop_in_order() {
    let mut f = fixture(policy(Strategy::OneForOne), false).await;
    for round in 0..5 {
        until("b is up", || f.addresses[1].cast(ProbeMsg::Noop)).await;
        until("b restarted", || f.addresses[1].stats().total_restarts() == round).await;
        until("b takes it", || f.addresses[1].cast(ProbeMsg::Fail)).await;
    }
    tokio::time::timeout(Duration::from_secs(20), f.tree.gave_up()).await.expect("the supervisor gives up");
    let log = f.log.lock().unwrap().clone();
    let stops: Vec<_> = log.iter().filter(|line| line.ends_with("stop")).collect();
    assert_eq!(stops, ["c stop", "a stop"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_cannot_start_escalates_within_its_intensity_and_blocks_those_after_it() {
    let mut f = fixture(policy(Strategy::OneForOne), true).await;
    tokio::time::timeout(Duration::from_secs(20), f.tree.gave_up()).await.expect("the supervisor gives up");
    assert!(f.log.lock().unwrap().is_empty(), "nobody starts before the first child");
    assert_eq!(f.addresses[0].stats().last_error().as_deref(), Some("refused"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_refuses_for_a_while_starts_in_the_end() {
    let f = fixture(policy(Strategy::RestForOne), true).await;
    until("a was refused", || f.addresses[0].stats().last_error().is_some()).await;
    *f.refuse.lock().unwrap() = false;
    assert_eq!(f.log_reaches(3).await, ["a up", "b up", "c up"]);
    f.tree.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_escalating_group_is_restarted_by_its_parent() {
    let log = Log::default();
    let refuse = Arc::new(Mutex::new(true));
    let address = Address::new("inner");
    let child = {
        let (log, refuse) = (log.clone(), refuse.clone());
        Child::actor::<Probe>(&address, move || ("inner", log.clone(), refuse.clone()))
    };
    let group = Child::supervisor("group", policy(Strategy::OneForOne), vec![child]);
    let tree = Tree::start(Child::supervisor("root", policy(Strategy::OneForOne), vec![group])).await.unwrap();
    until("the group escalated", || tree.root().find("group").unwrap().stats().total_restarts() == 1).await;
    *refuse.lock().unwrap() = false;
    until("it is up", || log.lock().unwrap().iter().any(|line| line == "inner up")).await;
    assert!(tree.root().find("group").unwrap().stats().last_error().unwrap().contains("inner failed 5 times"));
    tree.stop().await;
}

#[test]
fn the_pause_doubles_up_to_its_bound_and_is_spread_by_at_most_a_quarter() {
    let backoff = Backoff { min: Duration::from_millis(50), max: Duration::from_secs(2) };
    let delays: Vec<_> = (1..=8).map(|n| backoff.delay(n, 0.0).as_millis()).collect();
    assert_eq!(delays, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
    assert_eq!(backoff.delay(7, 1.0), Duration::from_millis(1500));
    assert_eq!(backoff.delay(usize::MAX, 0.0), Duration::from_secs(2));
}
