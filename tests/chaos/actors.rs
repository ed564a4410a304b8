//! Every actor panics, again and again.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use kinesin::admin::views::TreeView;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use tokio::time::Instant;

use super::rig::{Lease, Rig, actors, difference, is_running};

/// Panics of each actor.
const TIMES: u64 = 20;
/// A child that fails more than six times in twenty seconds is escalated, which is another test: no more than this many.
const PER_WINDOW: usize = 5;
const WINDOW: Duration = Duration::from_millis(20_500);
/// Bound for all of it: each group's members one after the other, four windows at least, and room for a busy machine.
const BOUND: Duration = Duration::from_secs(600);

/// Actors that fall with each other; outside such groups each is alone.
const GROUPS: [&[&str]; 3] = [
    &["link_watcher", "stack_watcher"],
    &["loader", "map_writer", "flow_collector", "socket_reaper"],
    &["service_watcher", "endpoint_watcher", "pod_watcher", "endpoint_syncer", "status_writer"],
];

/// The actor that answers on the admin socket.
const HEALTH: &str = "health_server";

/// One victim or group of victims: at most one of them is down by our hand at any time, so that counts are exact.
struct Group {
    members: Vec<String>,
    /// Whom to kill, in this order.
    queue: VecDeque<String>,
    /// Somebody was told to panic and the counts are not yet as expected.
    waiting: bool,
}

struct Executioner {
    groups: Vec<Group>,
    /// Panics and restarts by a sibling's fall that each actor should have.
    expected: BTreeMap<String, (u64, u64)>,
    recent: BTreeMap<String, VecDeque<Instant>>,
}

impl Executioner {
    fn new(tree: &TreeView, times: u64, rng: &mut StdRng) -> Self {
        let names: Vec<String> = actors(tree).into_keys().collect();
        let grouped = |name: &str| GROUPS.iter().any(|group| group.contains(&name));
        let mut members: Vec<Vec<String>> =
            GROUPS.iter().map(|group| group.iter().map(|name| name.to_string()).collect()).collect();
        members.extend(names.iter().filter(|name| !grouped(name)).map(|name| vec![name.clone()]));
        let group = |members: Vec<String>| {
            let mut queue: Vec<String> = members.iter().flat_map(|name| vec![name.clone(); times as usize]).collect();
            queue.shuffle(rng);
            Group { members, queue: queue.into(), waiting: false }
        };
        let groups = members.into_iter().map(group).collect();
        let expected = names.iter().map(|name| (name.clone(), (0, 0))).collect();
        Self { groups, expected, recent: BTreeMap::new() }
    }

    fn is_done(&self) -> bool {
        self.groups.iter().all(|group| group.queue.is_empty() && !group.waiting)
    }

    /// Takes the tree as it is; returns the next victims, one per group that is whole.
    fn next(&mut self, tree: &TreeView) -> Vec<String> {
        let seen = actors(tree);
        let expected = &self.expected;
        let whole = |name: &String| is_running(&seen[name]) && counts(&seen[name]) == expected[name];
        let mut victims = Vec::new();
        if !whole(&HEALTH.to_owned()) {
            // Orders would get lost on their way, or would not: nothing could be counted.
            return victims;
        }
        for group in &mut self.groups {
            if !group.members.iter().all(whole) {
                continue;
            }
            group.waiting = false;
            let now = Instant::now();
            let is_fresh = |at: &Instant| now.duration_since(*at) < WINDOW;
            // The next in the queue whose window has room.
            let room = group.queue.iter().position(|name| {
                self.recent.get(name).is_none_or(|r| r.iter().filter(|at| is_fresh(at)).count() < PER_WINDOW)
            });
            if let Some(victim) = room.and_then(|at| group.queue.remove(at)) {
                victims.push(victim);
            }
        }
        victims
    }

    fn killed(&mut self, victim: &str) {
        let Some(group) = self.groups.iter_mut().find(|group| group.members.iter().any(|name| name == victim)) else {
            return;
        };
        group.waiting = true;
        self.recent.entry(victim.to_owned()).or_default().push_back(Instant::now());
        let after = group.members.iter().skip_while(|name| *name != victim);
        for (i, name) in after.enumerate() {
            let (panics, siblings) = self.expected.get_mut(name).expect("every member is an actor");
            if i == 0 { *panics += 1 } else { *siblings += 1 }
        }
    }

    fn missed(&mut self, victim: String) {
        let group = self.groups.iter_mut().find(|group| group.members.contains(&victim));
        group.expect("every victim has a group").queue.push_front(victim);
    }
}

/// Restarts by panic and by a sibling's fall; any other restart makes the counts wrong for good.
fn counts(actor: &TreeView) -> (u64, u64) {
    let of = |cause: &str| actor.restarts.get(cause).copied().unwrap_or(0);
    assert_eq!((of("error"), of("refused")), (0, 0), "{}: {:?}", actor.name, actor.last_error);
    (of("panic"), of("sibling"))
}

/// Kills every actor of a node so many times; asserts the counts.
async fn kill_everybody(rig: &Rig, number: usize, times: u64, rng: &mut StdRng) {
    let mut tree = rig.tree(number).await.expect("the agent answers");
    let mut executioner = Executioner::new(&tree, times, rng);
    let deadline = Instant::now() + BOUND;
    while !executioner.is_done() {
        assert!(Instant::now() < deadline, "not done within {BOUND:?}: expected {:?}, {tree:#?}", executioner.expected);
        let Some(now) = rig.tree(number).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        tree = now;
        let mut victims = executioner.next(&tree);
        victims.shuffle(rng);
        // It carries the orders.
        victims.sort_by_key(|victim| victim == HEALTH);
        for victim in victims {
            let before = executioner.expected[&victim].0;
            if rig.kill(number, &victim).await || (victim == HEALTH && panicked(rig, number, before).await) {
                executioner.killed(&victim);
            } else {
                executioner.missed(victim);
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for (name, actor) in actors(&rig.tree(number).await.expect("the agent answers")) {
        assert_eq!(counts(&actor), executioner.expected[&name], "{name}");
        assert_eq!(counts(&actor).0, times, "{name}");
    }
}

/// Whether the one that answers questions has died, although it could not say so.
async fn panicked(rig: &Rig, number: usize, before: u64) -> bool {
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline {
        if let Some(tree) = rig.tree(number).await {
            return actors(&tree)[HEALTH].restarts.get("panic").copied().unwrap_or(0) > before;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the admin socket does not come back");
}

fn seeded() -> StdRng {
    let seed = std::env::var("KINESIN_CHAOS_SEED").ok().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| rand::rng().random());
    eprintln!("KINESIN_CHAOS_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_actor_of_the_owner_panics_twenty_times_and_nothing_is_lost() {
    let rig = Rig::start("actors", Lease::Patient, &[]).await;
    let owner = rig.owner(&[]).await;
    let load = rig.load().await;
    let (before, pid) = (rig.picture(owner), rig.agent(owner).pid());
    let mut rng = seeded();
    kill_everybody(&rig, owner, TIMES, &mut rng).await;
    load.more(50).await;
    assert_eq!(rig.owner(&[]).await, owner, "nothing moved");
    let changes = difference(&before, &rig.picture(owner));
    assert!(changes.is_empty(), "{changes:#?}");
    assert_eq!(rig.agent(owner).pid(), pid);
    assert!(rig.agent(owner).process().exit_status().is_none(), "the process lives");
    let total = rig.metric(owner, "kinesin_actor_restarts_total").await;
    assert!(total >= (TIMES * 18) as f64, "{total}");
    load.nothing_lost().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn panicking_actors_of_a_standby_never_make_it_answer() {
    let rig = Rig::start("standby", Lease::Patient, &[]).await;
    let owner = rig.owner(&[]).await;
    let standby = *(1..=3).filter(|number| *number != owner).collect::<Vec<_>>().choose(&mut rand::rng()).unwrap();
    let load = rig.load().await;
    let before = rig.picture(standby);
    let wire = rig.watch_wire();
    kill_everybody(&rig, standby, PER_WINDOW as u64, &mut seeded()).await;
    load.more(50).await;
    let heard = wire.stop().await;
    assert!(heard.iter().all(|(_, answering)| *answering == [owner]), "{heard:?}");
    let changes = difference(&before, &rig.picture(standby));
    assert!(changes.is_empty(), "{changes:#?}");
    load.nothing_lost().await;
}
