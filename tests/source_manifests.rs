//! The manifests source on real directories: what is written to files comes out as events, and nothing else does.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by where it panics")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use kinesin::source::{Event, Events, IPAM_CONDITION, ManifestsSource, Source, WriteError};
use kinesin_core::objects::{Condition, Lease, Object, ObjectKey, Service};
use tempfile::TempDir;

/// Generous: two busy cores, and seven neighbours.
const BOUND: Duration = Duration::from_secs(20);

struct Fixture {
    manifests: TempDir,
    state: TempDir,
}

impl Fixture {
    fn new() -> Self {
        Self { manifests: TempDir::new().unwrap(), state: TempDir::new().unwrap() }
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.manifests.path().join(name), text).unwrap();
    }

    fn open(&self) -> Arc<ManifestsSource> {
        ManifestsSource::open(self.manifests.path(), self.state.path()).unwrap()
    }
}

fn service(name: &str, port: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{type: LoadBalancer, ports: [{{port: {port}}}]}}\n"
    )
}

async fn next<T: Object>(events: &mut Events<T>) -> Event<T> {
    tokio::time::timeout(BOUND, events.next()).await.expect("an event in time").expect("a stream that does not end")
}

/// A stream with the state that it described.
struct Follower<T: Object> {
    events: Events<T>,
    objects: BTreeMap<String, T>,
    problems: Vec<String>,
    deleted: Vec<String>,
}

impl<T: Object> Follower<T> {
    async fn new(events: Events<T>) -> Self {
        let mut follower = Self { events, objects: BTreeMap::new(), problems: vec![], deleted: vec![] };
        while follower.step().await != Event::InitDone {}
        follower
    }

    async fn step(&mut self) -> Event<T> {
        let event = next(&mut self.events).await;
        match &event {
            Event::InitApply(object) | Event::Apply(object) => {
                self.objects.insert(object.key().to_string(), object.clone());
            }
            Event::Delete(key) => {
                assert!(self.objects.remove(&key.to_string()).is_some(), "deleted {key} twice");
                self.deleted.push(key.to_string());
            }
            Event::Problem(text) => self.problems.push(text.clone()),
            Event::Init | Event::InitDone => {}
        }
        event
    }

    async fn until(&mut self, condition: impl Fn(&Self) -> bool) {
        while !condition(self) {
            self.step().await;
        }
    }

    fn names(&self) -> Vec<&str> {
        self.objects.keys().map(String::as_str).collect()
    }
}

impl Follower<Service> {
    fn port(&self, name: &str) -> u16 {
        self.objects.get(name).map_or(0, |service| service.spec.ports[0].port)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_begins_with_a_complete_list() {
    let fixture = Fixture::new();
    fixture.write("b.yaml", &service("b", 80));
    fixture.write("a.yml", &service("a", 80));
    fixture.write("ignored.txt", "not: yaml: at: all");
    let source = fixture.open();
    let mut events = source.services();
    assert_eq!(next(&mut events).await, Event::Init);
    assert!(matches!(next(&mut events).await, Event::InitApply(s) if s.metadata.name == "a"));
    assert!(matches!(next(&mut events).await, Event::InitApply(s) if s.metadata.name == "b"));
    assert_eq!(next(&mut events).await, Event::InitDone);
    let mut nodes = source.nodes();
    assert_eq!((next(&mut nodes).await, next(&mut nodes).await), (Event::Init, Event::InitDone));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_real_differences_become_events() {
    let fixture = Fixture::new();
    fixture.write("s.yaml", &[service("a", 80), service("b", 80)].concat());
    let source = fixture.open();
    let mut services = Follower::new(source.services()).await;
    // Another order, a comment, and the same again: nothing. Then one real change.
    fixture.write("s.yaml", &format!("# moved\n{}{}", service("b", 80), service("a", 80)));
    fixture.write("s.yaml", &format!("# moved\n{}{}", service("b", 80), service("a", 8080)));
    assert!(matches!(services.step().await, Event::Apply(s) if s.metadata.name == "a" && s.spec.ports[0].port == 8080));
    fixture.write("s.yaml", &service("a", 8080));
    assert_eq!(services.step().await, Event::Delete(ObjectKey::new("default", "b")));
    fs::remove_file(fixture.manifests.path().join("s.yaml")).unwrap();
    assert_eq!(services.step().await, Event::Delete(ObjectKey::new("default", "a")));
    assert!(services.problems.is_empty(), "{:?}", services.problems);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_file_keeps_what_was_read_from_it_and_says_where_it_is_bad() {
    let fixture = Fixture::new();
    fixture.write("a.yaml", &[service("one", 80), service("two", 80)].concat());
    fixture.write("b.yaml", &service("other", 80));
    let source = fixture.open();
    let mut services = Follower::new(source.services()).await;

    fixture.write("a.yaml", "apiVersion: v1\nkind: [Service\n");
    services.until(|s| !s.problems.is_empty()).await;
    assert!(services.problems[0].starts_with("a.yaml:"), "{:?}", services.problems);
    assert_eq!(source.health().problems, services.problems);
    // Life goes on in other files, and nothing of the bad one is lost.
    fixture.write("b.yaml", &service("other", 81));
    services.until(|s| s.port("default/other") == 81).await;
    assert_eq!(services.names(), ["default/one", "default/other", "default/two"]);

    // One bad object does not hold up its neighbours, and keeps its own last good version.
    fixture.write("a.yaml", &[service("one", 82), service("two", 80).replace("80", "eighty")].concat());
    services.until(|s| s.port("default/one") == 82 && s.problems.len() == 2).await;
    assert!(
        services.problems[1].contains("a.yaml:10:") && services.problems[1].contains("spec.ports[0].port"),
        "{services:?}",
        services = services.problems
    );
    assert_eq!(services.port("default/two"), 80);

    fixture.write("a.yaml", &service("one", 83));
    services.until(|s| s.port("default/one") == 83 && s.deleted == ["default/two"]).await;
    assert!(source.health().problems.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_bad_from_the_start_does_not_hide_the_others() {
    let fixture = Fixture::new();
    fixture.write("a.yaml", "}{");
    fixture.write("b.yaml", &service("b", 80));
    let source = fixture.open();
    let mut services = Follower::new(source.services()).await;
    assert_eq!(services.names(), ["default/b"]);
    services.until(|s| !s.problems.is_empty()).await;
    fixture.write("a.yaml", &service("a", 80));
    services.until(|s| s.names().len() == 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_file_with_an_object_wins_and_the_other_is_reported() {
    let fixture = Fixture::new();
    fixture.write("a.yaml", &service("x", 80));
    fixture.write("b.yaml", &service("x", 81));
    let source = fixture.open();
    let mut services = Follower::new(source.services()).await;
    assert_eq!(services.port("default/x"), 80);
    services.until(|s| !s.problems.is_empty()).await;
    assert_eq!(services.problems, ["b.yaml: Service default/x is already in a.yaml, which counts; remove one"]);
    fs::remove_file(fixture.manifests.path().join("a.yaml")).unwrap();
    services.until(|s| s.port("default/x") == 81).await;
    assert!(services.deleted.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_moves_between_files_is_never_gone() {
    let fixture = Fixture::new();
    fixture.write("a.yaml", &[service("stays", 80), service("moves", 80)].concat());
    let source = fixture.open();
    let mut services = Follower::new(source.services()).await;
    fixture.write("a.yaml", &service("stays", 80));
    fixture.write("b.yaml", &service("moves", 81));
    services.until(|s| s.port("default/moves") == 81).await;
    fixture.write("c.yaml", &service("last", 80));
    services.until(|s| s.objects.contains_key("default/last")).await;
    assert!(services.deleted.is_empty() && services.problems.is_empty(), "{:?}", services.problems);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_being_written_does_not_lose_its_objects() {
    use std::io::Write as _;
    let fixture = Fixture::new();
    fixture.write("a.yaml", &[service("one", 80), service("two", 80)].concat());
    let source = fixture.open();
    let mut services = Follower::new(source.services()).await;
    // Truncated, then half of it, then a change elsewhere that is seen meanwhile.
    let mut file = fs::File::create(fixture.manifests.path().join("a.yaml")).unwrap();
    file.write_all(service("one", 81).as_bytes()).unwrap();
    file.flush().unwrap();
    fixture.write("b.yaml", &service("other", 80));
    services.until(|s| s.objects.contains_key("default/other")).await;
    assert_eq!(services.port("default/two"), 80);
    file.write_all(service("two", 81).as_bytes()).unwrap();
    drop(file);
    services.until(|s| s.port("default/two") == 81).await;
    assert!(services.deleted.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_maps_symlink_swap_is_one_change() {
    let fixture = Fixture::new();
    let dir = fixture.manifests.path();
    let version = |name: &str, text: &str| {
        fs::create_dir(dir.join(name)).unwrap();
        fs::write(dir.join(name).join("s.yaml"), text).unwrap();
    };
    let point = |name: &str| {
        symlink(name, dir.join("..data_tmp")).unwrap();
        fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
    };
    version("..2026_1", &[service("a", 80), service("b", 80)].concat());
    point("..2026_1");
    symlink("..data/s.yaml", dir.join("s.yaml")).unwrap();
    let source = fixture.open();
    let mut services = Follower::new(source.services()).await;
    assert_eq!(services.names(), ["default/a", "default/b"]);
    version("..2026_2", &[service("a", 81), service("c", 80)].concat());
    point("..2026_2");
    fs::remove_dir_all(dir.join("..2026_1")).unwrap();
    services.until(|s| s.names() == ["default/a", "default/c"] && s.port("default/a") == 81).await;
    assert!(services.problems.is_empty(), "{:?}", services.problems);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_goes_away_keeps_its_objects_and_one_that_comes_back_is_read() {
    let fixture = Fixture::new();
    let dir = fixture.manifests.path().join("inner");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("a.yaml"), service("a", 80)).unwrap();
    let source = ManifestsSource::open(&dir, fixture.state.path()).unwrap();
    let mut services = Follower::new(source.services()).await;
    fs::rename(&dir, fixture.manifests.path().join("gone")).unwrap();
    services.until(|s| !s.problems.is_empty()).await;
    assert!(!source.health().connected && services.names() == ["default/a"]);
    let fresh = fixture.manifests.path().join("fresh");
    fs::create_dir(&fresh).unwrap();
    fs::write(fresh.join("a.yaml"), service("a", 81)).unwrap();
    fs::rename(&fresh, &dir).unwrap();
    services.until(|s| s.port("default/a") == 81).await;
    // And the new directory is the one that is watched.
    fs::write(dir.join("a.yaml"), service("a", 82)).unwrap();
    services.until(|s| s.port("default/a") == 82).await;
    assert!(services.deleted.is_empty());
}

#[test]
fn a_missing_directory_is_refused_with_the_key_to_change() {
    let fixture = Fixture::new();
    let missing = fixture.manifests.path().join("missing");
    let error = ManifestsSource::open(missing, fixture.state.path()).err().unwrap().to_string();
    assert!(error.contains("missing") && error.contains("manifests-dir"), "{error}");
}

fn satisfied(status: &str) -> Condition {
    Condition { kind: IPAM_CONDITION.into(), status: status.into(), reason: "satisfied".into(), ..Condition::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn status_that_one_agent_writes_reaches_every_agent() {
    let fixture = Fixture::new();
    fixture.write("a.yaml", &service("a", 80));
    let (writer, reader) = (fixture.open(), fixture.open());
    let mut services = Follower::new(reader.services()).await;
    let key = ObjectKey::new("default", "a");
    let addresses = ["10.0.0.100".parse().unwrap(), "fd00::1".parse().unwrap()];
    writer.write_service_status(&key, &addresses, Some(&satisfied("True"))).await.unwrap();
    services.until(|s| s.objects["default/a"].ingress_addresses().collect::<Vec<_>>() == addresses).await;
    let status = services.objects["default/a"].status.clone();
    assert_eq!(status.conditions[0].kind, IPAM_CONDITION);
    assert!(!status.conditions[0].last_transition_time.is_empty());
    let file = fixture.state.path().join("status/Service/default_a.json");
    let written = fs::metadata(&file).unwrap();

    // The same again touches nothing; a change of the manifest keeps the status.
    writer.write_service_status(&key, &addresses, Some(&satisfied("True"))).await.unwrap();
    assert_eq!(fs::metadata(&file).unwrap().modified().unwrap(), written.modified().unwrap());
    fixture.write("a.yaml", &service("a", 81));
    services.until(|s| s.port("default/a") == 81).await;
    assert_eq!(services.objects["default/a"].status, status);

    // A new agent sees it from the start.
    let late = Follower::new(fixture.open().services()).await;
    assert_eq!(late.objects["default/a"].status, status);

    writer.write_service_status(&key, &[], None).await.unwrap();
    services.until(|s| s.objects["default/a"].status == Default::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pool_and_policy_status_merge_by_type() {
    let fixture = Fixture::new();
    fixture.write("guide.yaml", include_str!("../config/manifests/cilium-config.yaml"));
    let source = fixture.open();
    let condition = |kind: &str, message: &str| Condition {
        kind: kind.into(),
        status: "Unknown".into(),
        message: message.into(),
        ..Condition::default()
    };
    let mut pools = Follower::new(source.pools()).await;
    source.write_pool_status("first-pool", &[condition("total", "101"), condition("used", "0")]).await.unwrap();
    source.write_pool_status("first-pool", &[condition("used", "1")]).await.unwrap();
    let messages = |s: &Follower<kinesin_core::objects::Pool>| {
        s.objects["first-pool"].status.conditions.iter().map(|c| c.message.clone()).collect::<Vec<_>>()
    };
    pools.until(|s| messages(s) == ["101", "1"]).await;
    let mut policies = Follower::new(source.l2_policies()).await;
    source.write_policy_status("default-l2-announcement-policy", &[condition("bad", "x")]).await.unwrap();
    policies.until(|s| s.objects["default-l2-announcement-policy"].status.conditions.len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn status_of_an_object_without_manifest_is_not_written() {
    let fixture = Fixture::new();
    let source = fixture.open();
    for (namespace, name) in [("default", "a"), ("..", "../../x")] {
        let key = ObjectKey::new(namespace, name);
        let outcome = source.write_service_status(&key, &[], None).await;
        assert!(matches!(outcome, Err(WriteError::NotFound { .. })), "{outcome:?}");
    }
    assert_eq!(fs::read_dir(fixture.state.path().join("status/Service")).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_of_a_removed_service_does_not_wait_for_its_successor() {
    let fixture = Fixture::new();
    fixture.write("a.yaml", &[service("a", 80), service("b", 80)].concat());
    let source = fixture.open();
    let mut services = Follower::new(source.services()).await;
    source.write_service_status(&ObjectKey::new("default", "a"), &["10.0.0.1".parse().unwrap()], None).await.unwrap();
    services.until(|s| s.objects["default/a"].ingress_addresses().count() == 1).await;
    let file = fixture.state.path().join("status/Service/default_a.json");
    let old = std::time::SystemTime::now() - Duration::from_secs(60);
    fs::File::options().write(true).open(&file).unwrap().set_modified(old).unwrap();
    fixture.write("a.yaml", &service("b", 80));
    services.until(|s| s.deleted == ["default/a"]).await;
    source.write_service_status(&ObjectKey::new("default", "b"), &["10.0.0.2".parse().unwrap()], None).await.unwrap();
    assert!(!file.exists());
}

fn lease(name: &str, holder: &str) -> Lease {
    let mut lease = Lease::default();
    lease.metadata.name = name.into();
    lease.metadata.namespace = "kube-system".into();
    lease.spec.holder_identity = Some(holder.into());
    lease
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_created_renewed_seen_by_others_and_deleted() {
    let fixture = Fixture::new();
    let (one, two) = (fixture.open(), fixture.open());
    let mut leases = Follower::new(two.leases()).await;
    assert_eq!(one.get_lease("duties").await.unwrap(), None);
    let created = one.put_lease(&lease("duties", "n1")).await.unwrap();
    assert_eq!(two.get_lease("duties").await.unwrap().unwrap(), created);
    leases.until(|s| s.objects.get("kube-system/duties") == Some(&created)).await;

    let mut renewed = created.clone();
    renewed.spec.renew_time = Some("2026-01-01T00:00:01.000000Z".into());
    let renewed = one.put_lease(&renewed).await.unwrap();
    assert_ne!(renewed.metadata.resource_version, created.metadata.resource_version);
    leases.until(|s| s.objects["kube-system/duties"] == renewed).await;

    // Both the stale version and "create" lose.
    for stale in [created, lease("duties", "n2")] {
        assert!(matches!(two.put_lease(&stale).await, Err(WriteError::Conflict { .. })));
    }
    two.delete_lease("duties").await.unwrap();
    assert!(matches!(two.delete_lease("duties").await, Err(WriteError::NotFound { .. })));
    assert!(matches!(one.put_lease(&renewed).await, Err(WriteError::Conflict { .. })));
    leases.until(|s| s.objects.is_empty()).await;
    assert!(matches!(one.put_lease(&lease("../x", "n1")).await, Err(WriteError::Refused { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_writers_of_one_lease_version_exactly_one_wins() {
    let fixture = Fixture::new();
    let sources: Vec<_> = (0..4).map(|_| fixture.open()).collect();
    let mut current = sources[0].put_lease(&lease("duties", "nobody")).await.unwrap();
    for round in 0..25 {
        let attempts = (0..8).map(|n| {
            let source = sources[n % sources.len()].clone();
            let mut mine = current.clone();
            mine.spec.holder_identity = Some(format!("n{n}-{round}").into());
            tokio::spawn(async move { source.put_lease(&mine).await })
        });
        let outcomes: Vec<_> =
            futures::future::join_all(attempts).await.into_iter().map(|joined| joined.unwrap()).collect();
        let winners: Vec<_> = outcomes.iter().flatten().collect();
        assert_eq!(winners.len(), 1, "round {round}: {outcomes:?}");
        let lost = outcomes.iter().filter(|o| matches!(o, Err(WriteError::Conflict { .. }))).count();
        assert_eq!(lost, 7, "round {round}: {outcomes:?}");
        current = winners[0].clone();
        assert_eq!(sources[1].get_lease("duties").await.unwrap().as_ref(), Some(&current));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_state_files_are_reported_and_replaced() {
    let fixture = Fixture::new();
    fixture.write("a.yaml", &service("a", 80));
    let source = fixture.open();
    let mut services = Follower::new(source.services()).await;
    let damaged = |path: &Path| fs::write(path, "{").unwrap();
    damaged(&fixture.state.path().join("status/Service/default_a.json"));
    damaged(&fixture.state.path().join("leases/duties.json"));
    services.until(|s| !s.problems.is_empty()).await;
    assert!(services.problems[0].contains("delete the file"), "{:?}", services.problems);
    source.write_service_status(&ObjectKey::new("default", "a"), &["10.0.0.1".parse().unwrap()], None).await.unwrap();
    services.until(|s| s.objects["default/a"].ingress_addresses().count() == 1).await;
    let error = source.get_lease("duties").await.unwrap_err();
    assert!(error.to_string().contains("delete the file"), "{error}");
    source.put_lease(&lease("duties", "n1")).await.unwrap();
}
