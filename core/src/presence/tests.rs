use std::net::IpAddr;

use super::*;
use crate::devices::Families;
use crate::objects::{LeaseSpec, Meta};

fn record(node: &str) -> Record {
    Record { node: node.into(), instance: "1".into(), devices: vec!["eth0".into()], ..Record::default() }
}

fn lease(record: &Record, renew_time: &str) -> Lease {
    let annotations = [(ANNOTATION.into(), record.to_annotation().into())].into();
    Lease {
        metadata: Meta { name: lease_name(&record.node).into(), annotations, ..Meta::default() },
        spec: LeaseSpec {
            holder_identity: Some(record.node.clone()),
            lease_duration_seconds: Some(10),
            renew_time: Some(renew_time.into()),
            ..LeaseSpec::default()
        },
    }
}

fn after(start: Instant, seconds: u64) -> Instant {
    start + Duration::from_secs(seconds)
}

fn nodes(tracker: &Tracker, now: Instant) -> Vec<String> {
    tracker.alive(now).records.keys().map(ToString::to_string).collect()
}

#[test]
fn a_record_survives_the_way_through_an_annotation() {
    let ips = |list: &[&str]| list.iter().map(|ip| ip.parse().unwrap()).collect::<Vec<IpAddr>>();
    let mut full = record("a");
    full.since = "2026-01-01T00:00:00Z".into();
    full.draining = true;
    full.claims =
        ips(&["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.9", "255.255.255.255", "2001:db8::1", "2001:db8::2"]);
    assert_eq!(Record::from_lease(&lease(&full, "x")).unwrap(), full);
    assert!(full.to_annotation().contains("10.0.0.1-10.0.0.3,10.0.0.9,255.255.255.255,2001:db8::1-2001:db8::2"));
    assert_eq!(record("b").to_annotation(), r#"{"n":"b","i":"1","d":["eth0"]}"#);
}

#[test]
fn ten_thousand_claims_fit_into_an_annotation() {
    let mut full = record("a");
    // The worst case for ranges: every other address.
    full.claims = (0..10_000u32).map(|i| IpAddr::V4((0x0a00_0000 + 2 * i).into())).collect();
    let text = full.to_annotation();
    assert!(text.len() < 128 * 1024, "{}", text.len());
    assert_eq!(Record::from_lease(&lease(&full, "x")).unwrap().claims.len(), 10_000);
}

#[test]
fn an_unreadable_record_is_an_error_that_names_the_lease() {
    let good = lease(&record("a"), "x");
    for (text, part) in [
        ("", "not readable"),
        ("{}", "not readable"),
        (r#"{"n":"a","c":"10.0.0.300"}"#, "not readable"),
        (r#"{"n":"a","c":"0.0.0.0-255.255.255.255"}"#, "not readable"),
        (r#"{"n":"b"}"#, "names node b"),
    ] {
        let mut bad = good.clone();
        bad.metadata.annotations.insert(ANNOTATION.into(), text.into());
        let mut tracker = Tracker::new("me");
        let error = tracker.observe(&bad, Instant::now()).unwrap_err().to_string();
        assert!(error.contains("kinesin-node-a") && error.contains(part), "{error}");
        assert_eq!(tracker.next_deadline(Instant::now()), None);
    }
    let mut bare = good;
    bare.metadata.annotations.clear();
    assert!(matches!(Tracker::new("me").observe(&bare, Instant::now()), Err(RecordError::Missing { .. })));
}

#[test]
fn a_node_is_alive_while_its_lease_changes_whatever_its_clock_says() {
    let start = Instant::now();
    let mut tracker = Tracker::new("me");
    // A clock years behind, then one that runs backwards: only differences count.
    for (i, renewed) in ["1999-01-01T00:00:00Z", "2036-01-01T00:00:00Z", "1998-01-01T00:00:00Z"].into_iter().enumerate()
    {
        let now = after(start, 8 * i as u64);
        assert_eq!(tracker.expire(now), []);
        tracker.observe(&lease(&record("a"), renewed), now).unwrap();
        assert_eq!(nodes(&tracker, now), ["a"]);
    }
    // The same lease again is no sign of life.
    let again = lease(&record("a"), "1998-01-01T00:00:00Z");
    assert_eq!(tracker.observe(&again, after(start, 25)).unwrap(), []);
    assert_eq!(tracker.next_deadline(after(start, 25)), Some(after(start, 26)));
    assert_eq!(tracker.expire(after(start, 25)), []);
    assert_eq!(tracker.expire(after(start, 26)), [Change::Left("a".into())]);
    assert_eq!(tracker.expire(after(start, 27)), [], "told once");
    assert!(nodes(&tracker, after(start, 27)).is_empty());
    assert_eq!(tracker.next_deadline(after(start, 27)), None);
    let back = lease(&record("a"), "2000-01-01T00:00:00Z");
    assert_eq!(tracker.observe(&back, after(start, 99)).unwrap(), [Change::Joined("a".into())]);
}

#[test]
fn a_new_record_is_a_change_and_an_emptied_lease_a_farewell() {
    let start = Instant::now();
    let mut tracker = Tracker::new("me");
    assert_eq!(tracker.observe(&lease(&record("a"), "1"), start).unwrap(), [Change::Joined("a".into())]);
    let mut claims = record("a");
    claims.claims = vec!["10.0.0.1".parse().unwrap()];
    assert_eq!(tracker.observe(&lease(&claims, "2"), start).unwrap(), [Change::Changed("a".into())]);
    assert_eq!(tracker.observe(&lease(&claims, "3"), start).unwrap(), []);
    let mut gone = lease(&claims, "4");
    gone.spec.holder_identity = Some("".into());
    assert_eq!(tracker.observe(&gone, start).unwrap(), [Change::Left("a".into())]);
    assert_eq!(tracker.observe(&gone, start).unwrap(), []);
    tracker.observe(&lease(&claims, "5"), start).unwrap();
    assert_eq!(tracker.removed("kinesin-node-a"), [Change::Left("a".into())]);
    let mut other = lease(&claims, "6");
    other.metadata.name = "kinesin-leader".into();
    assert_eq!(tracker.observe(&other, start).unwrap(), []);
}

#[test]
fn r08_silence_during_an_api_outage_kills_nobody() {
    let start = Instant::now();
    let mut tracker = Tracker::new("me");
    // Not all at once: who renewed first would be the first to be given up.
    tracker.observe(&lease(&record("a"), "1"), start).unwrap();
    tracker.observe(&lease(&record("b"), "1"), after(start, 2)).unwrap();
    tracker.observe(&lease(&record("me"), "1"), after(start, 3)).unwrap();
    // Nothing is heard of for half an hour, not even our own renewals.
    for seconds in [10, 12, 13, 20, 1800] {
        let late = after(start, seconds);
        assert_eq!(tracker.expire(late), [], "after {seconds} s");
        assert!(tracker.alive(late).self_seen);
    }
    let late = after(start, 1800);
    assert_eq!(tracker.next_deadline(late), None);
    assert_eq!(nodes(&tracker, late), ["a", "b", "me"]);
    // The API is back: whoever is heard first, the others get a whole duration from here.
    tracker.observe(&lease(&record("me"), "2"), late).unwrap();
    for seconds in [3, 6, 9] {
        assert_eq!(tracker.expire(after(late, seconds)), []);
        let renewed = seconds.to_string();
        tracker.observe(&lease(&record("me"), &renewed), after(late, seconds)).unwrap();
        tracker.observe(&lease(&record("b"), &renewed), after(late, seconds)).unwrap();
    }
    assert_eq!(tracker.expire(after(late, 10)), [Change::Left("a".into())], "a died during the outage");
    assert_eq!(nodes(&tracker, after(late, 10)), ["b", "me"]);
}

#[test]
fn a_node_whose_own_renewals_fail_while_others_succeed_knows_that_it_is_not_seen() {
    let start = Instant::now();
    let mut tracker = Tracker::new("me");
    assert!(!tracker.alive(start).self_seen, "nothing written yet");
    tracker.observe(&lease(&record("me"), "1"), start).unwrap();
    for seconds in (0..30).step_by(3) {
        let now = after(start, seconds);
        tracker.observe(&lease(&record("a"), &seconds.to_string()), now).unwrap();
        assert_eq!(tracker.expire(now), []);
        assert_eq!(tracker.alive(now).self_seen, seconds < 10, "after {seconds} s");
    }
    // Others still die.
    assert_eq!(nodes(&tracker, after(start, 30)), ["a", "me"]);
    tracker.observe(&lease(&record("me"), "2"), after(start, 31)).unwrap();
    assert!(tracker.alive(after(start, 31)).self_seen);
}

#[test]
fn the_next_deadline_is_never_in_the_past_for_long() {
    let start = Instant::now();
    let mut tracker = Tracker::new("me");
    tracker.observe(&lease(&record("me"), "1"), start).unwrap();
    tracker.observe(&lease(&record("a"), "1"), after(start, 1)).unwrap();
    tracker.observe(&lease(&record("me"), "2"), after(start, 5)).unwrap();
    tracker.observe(&lease(&record("me"), "3"), after(start, 9)).unwrap();
    assert_eq!(tracker.next_deadline(after(start, 9)), Some(after(start, 11)));
    assert_eq!(tracker.next_deadline(after(start, 12)), Some(after(start, 12)), "due");
    assert_eq!(tracker.expire(after(start, 12)), [Change::Left("a".into())]);
    assert_eq!(tracker.next_deadline(after(start, 12)), Some(after(start, 19)));
    assert_eq!(tracker.next_deadline(after(start, 20)), None);
}

mod election_tests {
    use super::super::election::{Effect, Input};
    use super::*;

    /// A server with conditional writes, and a clock.
    struct World {
        now: Instant,
        lease: Option<Lease>,
        version: u64,
        candidates: Vec<(Election, Vec<Effect>, bool)>,
        reachable: bool,
    }

    impl World {
        fn new(count: usize) -> Self {
            let candidates = (0..count).map(|i| (Election::new(format!("n{i}"), Timing::default()), vec![], true));
            let mut world = Self {
                now: Instant::now(),
                lease: None,
                version: 0,
                candidates: candidates.collect(),
                reachable: true,
            };
            for i in 0..count {
                world.step(i, Input::Lease(None));
            }
            world
        }

        fn leaders(&self) -> Vec<usize> {
            (0..self.candidates.len()).filter(|i| self.candidates[*i].0.is_leader()).collect()
        }

        fn step(&mut self, i: usize, input: Input) {
            let (election, log, _) = &mut self.candidates[i];
            let effects = election.step(input, self.now);
            log.extend(effects.clone());
            for effect in effects {
                if let Effect::Write { spec, resource_version } = effect {
                    self.write(i, spec, resource_version);
                }
            }
            assert!(self.leaders().len() <= 1, "two leaders");
        }

        fn write(&mut self, i: usize, mut spec: LeaseSpec, resource_version: Option<SmolStr>) {
            let current = self.lease.as_ref().map(|lease| lease.metadata.resource_version.clone());
            if !self.reachable || current != resource_version {
                return self.step(i, Input::WriteFailed);
            }
            self.version += 1;
            let stamp = SmolStr::from(format!("t{}", self.version));
            spec.renew_time = Some(stamp.clone());
            spec.acquire_time = spec.acquire_time.or(Some(stamp));
            let metadata = Meta { resource_version: self.version.to_string().into(), ..Meta::default() };
            self.lease = Some(Lease { metadata, spec });
            let lease = self.lease.clone();
            self.step(i, Input::WriteSucceeded(lease.clone().expect("just written")));
            for other in 0..self.candidates.len() {
                if other != i && self.candidates[other].2 {
                    self.step(other, Input::Lease(lease.clone()));
                }
            }
        }

        /// Everybody sleeps exactly until the time that they asked for.
        fn run(&mut self, seconds: u64) {
            for _ in 0..seconds * 10 {
                self.now += Duration::from_millis(100);
                for i in 0..self.candidates.len() {
                    let wake = self.candidates[i].1.iter().rev().find_map(|effect| match effect {
                        Effect::WakeAt(at) => Some(*at),
                        _ => None,
                    });
                    if self.candidates[i].2 && wake.is_some_and(|at| at <= self.now) {
                        self.step(i, Input::Tick);
                    }
                }
            }
        }
    }

    #[test]
    fn the_first_one_leads_and_keeps_leading() {
        let mut world = World::new(3);
        assert_eq!(world.leaders(), [0]);
        world.run(60);
        assert_eq!(world.leaders(), [0]);
        let spec = &world.lease.as_ref().unwrap().spec;
        assert_eq!((spec.lease_duration_seconds, spec.lease_transitions), (Some(15), Some(0)));
        assert_eq!(spec.acquire_time.as_deref(), Some("t1"), "kept over renewals");
        assert!((25..=35).contains(&world.version), "one write every retry period, not {}", world.version);
    }

    #[test]
    fn a_dead_leader_is_followed_after_the_duration_and_not_before() {
        let mut world = World::new(3);
        world.run(10);
        world.candidates[0].2 = false;
        // It cannot know that it is dead; others must not be misled by what it thinks.
        world.candidates[0].0 = Election::new("dead", Timing::default());
        world.run(12);
        assert!(world.leaders().is_empty());
        world.run(6);
        assert_eq!(world.leaders().len(), 1);
        assert_eq!(world.lease.as_ref().unwrap().spec.lease_transitions, Some(1));
    }

    #[test]
    fn r09_a_leader_without_the_api_stops_in_time_and_leads_again_when_it_is_back() {
        let mut world = World::new(1);
        world.run(10);
        world.reachable = false;
        world.run(6);
        assert!(world.leaders().is_empty(), "stops within the renew deadline");
        assert!(world.candidates[0].1.contains(&Effect::LostLeadership));
        world.run(120);
        world.reachable = true;
        world.run(3);
        assert_eq!(world.leaders(), [0]);
    }

    #[test]
    fn r09_a_write_that_is_never_answered_does_not_silence_for_good() {
        let start = Instant::now();
        let mut election = Election::new("a", Timing::default());
        let writes = |effects: &[Effect]| effects.iter().filter(|e| matches!(e, Effect::Write { .. })).count();
        assert_eq!(writes(&election.step(Input::Lease(None), start)), 1);
        assert_eq!(writes(&election.step(Input::Tick, after(start, 4))), 0);
        assert_eq!(writes(&election.step(Input::Tick, after(start, 5))), 1);
        // An answer that comes too late makes no leader: others may soon think that the lease is free.
        let mine = LeaseSpec { holder_identity: Some("a".into()), ..LeaseSpec::default() };
        let landed = Lease { spec: mine, ..Lease::default() };
        let effects = election.step(Input::WriteSucceeded(landed), after(start, 6));
        assert!(!election.is_leader());
        assert_eq!(writes(&effects), 1, "tries again at once: {effects:?}");
    }

    #[test]
    fn release_empties_the_lease_and_the_next_one_need_not_wait() {
        let mut world = World::new(2);
        world.run(5);
        world.step(0, Input::Release);
        assert!(world.candidates[0].1.contains(&Effect::LostLeadership));
        world.run(3);
        assert_eq!(world.leaders(), [1]);
        world.run(30);
        assert_eq!(world.leaders(), [1], "a released candidate stays away");
    }

    #[test]
    fn a_restarted_leader_takes_its_own_lease_at_once() {
        let mut world = World::new(1);
        world.run(5);
        let lease = world.lease.clone();
        world.candidates[0] = (Election::new("n0", Timing::default()), vec![], true);
        world.step(0, Input::Lease(lease));
        assert_eq!(world.leaders(), [0]);
        assert_eq!(world.lease.as_ref().unwrap().spec.lease_transitions, Some(0));
    }

    #[test]
    fn a_lease_taken_by_somebody_else_ends_leadership_at_once() {
        let mut world = World::new(1);
        let mut stolen = world.lease.clone().unwrap();
        stolen.spec.holder_identity = Some("other".into());
        stolen.spec.renew_time = Some("z".into());
        world.lease = Some(stolen.clone());
        world.step(0, Input::Lease(Some(stolen)));
        assert!(world.leaders().is_empty());
    }

    #[test]
    fn timing_that_cannot_work_is_changed_with_a_warning() {
        let ms = Duration::from_millis;
        let timing = |l, d, r| Timing { lease_duration: ms(l), renew_deadline: ms(d), retry_period: ms(r) };
        let cases = [
            (timing(15_000, 5_000, 2_000), timing(15_000, 5_000, 2_000), 0),
            (timing(0, 500, 200), timing(1_000, 500, 200), 1),
            (timing(15_000, 0, 200), timing(15_000, 1_000, 200), 1),
            (timing(15_000, 5_000, 0), timing(15_000, 5_000, 200), 1),
            (timing(10_000, 10_000, 2_000), timing(10_000, 5_000, 2_000), 1),
            (timing(15_000, 6_000, 5_000), timing(15_000, 6_000, 3_000), 1),
            (timing(0, 0, 0), timing(1_000, 500, 200), 4),
        ];
        for (given, expected, warnings) in cases {
            let (got, texts) = given.sanitised();
            assert_eq!((got, texts.len()), (expected, warnings), "{given:?}: {texts:?}");
            assert_eq!(got.sanitised(), (got, vec![]), "what comes out is fine as it is");
        }
    }
}

#[test]
fn who_was_gone_before_a_restart_is_still_gone_until_its_lease_changes() {
    let start = Instant::now();
    let mut tracker = Tracker::new("me");
    tracker.observe(&lease(&record("me"), "m1"), start).unwrap();
    tracker.observe(&lease(&record("dead"), "d1"), start).unwrap();
    for (renewal, seconds) in [("m2", 4), ("m3", 8)] {
        tracker.observe(&lease(&record("me"), renewal), after(start, seconds)).unwrap();
    }
    assert_eq!(tracker.expire(after(start, 10)), [Change::Left("dead".into())]);
    let mine = Record { gone: tracker.gone(), ..record("me") };
    assert_eq!(Record::from_lease(&lease(&mine, "m4")).unwrap(), mine, "it survives the way through an annotation");

    // Whatever the order in which the Leases are listed.
    for own_first in [true, false] {
        let mut leases = [lease(&record("dead"), "d1"), lease(&mine, "m4"), lease(&record("other"), "o1")];
        if own_first {
            leases.swap(0, 1);
        }
        let mut again = Tracker::new("me");
        for lease in &leases {
            again.observe(lease, after(start, 20)).unwrap();
        }
        assert_eq!(nodes(&again, after(start, 20)), ["me", "other"]);
        assert_eq!(again.gone(), mine.gone, "it goes on to be remembered");
        again.observe(&lease(&record("dead"), "d2"), after(start, 21)).unwrap();
        assert_eq!(nodes(&again, after(start, 21)), ["dead", "me", "other"], "a sign of life");
        again.observe(&lease(&mine, "m5"), after(start, 22)).unwrap();
        assert_eq!(nodes(&again, after(start, 22)), ["dead", "me", "other"], "what the record said is over");
    }
}

#[test]
fn a_record_says_what_each_device_cannot_answer_for() {
    let (four, six) = (Families { ipv4: true, ipv6: false }, Families { ipv4: false, ipv6: true });
    let devices = [("eth0", Families::BOTH), ("eth1", four), ("eth2", six)].map(|(name, can)| (name.into(), can));
    let mut record = record("a");
    record.set_announcers(devices.clone());
    assert_eq!(
        record.to_annotation(),
        r#"{"n":"a","i":"1","d":["eth0","eth1","eth2"],"x4":["eth2"],"x6":["eth1"]}"#,
        "earlier agents read d, and nothing of the rest"
    );
    let read = Record::from_lease(&lease(&record, "x")).unwrap();
    assert_eq!(read.announcers().map(|(name, can)| (name.clone(), can)).collect::<Vec<_>>(), devices);
    // As earlier agents write it.
    let mut old = lease(&record, "x");
    old.metadata.annotations = [(ANNOTATION.into(), r#"{"n":"a","d":["eth1"]}"#.into())].into();
    let read = Record::from_lease(&old).unwrap();
    assert_eq!(read.announcers().map(|(_, can)| can).collect::<Vec<_>>(), [Families::BOTH]);
}
