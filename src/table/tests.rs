use std::sync::atomic::AtomicUsize;

use super::*;

fn counted(table: &Table<u32, &'static str>) -> (Subscription<u32, &'static str>, Arc<AtomicUsize>) {
    let wakes = Arc::new(AtomicUsize::new(0));
    let counter = wakes.clone();
    let subscription = table.subscribe(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    });
    (subscription, wakes)
}

#[test]
fn a_subscriber_sees_what_was_there_before_it() {
    let table = Table::default();
    table.put(1, "a");
    let (subscription, wakes) = counted(&table);
    assert_eq!(wakes.load(Ordering::Relaxed), 1);
    assert_eq!(subscription.take(), [(1, Some(Arc::new("a")))]);
    assert_eq!(subscription.take(), []);
}

#[test]
fn a_burst_on_one_key_is_one_change_and_one_wake_up() {
    let table = Table::default();
    let (subscription, wakes) = counted(&table);
    subscription.take();
    for value in ["a", "b", "c"] {
        table.put(7, value);
    }
    assert_eq!(wakes.load(Ordering::Relaxed), 2, "one for subscribing, one for the burst");
    assert_eq!(subscription.take(), [(7, Some(Arc::new("c")))]);
    table.remove(&7);
    assert_eq!(wakes.load(Ordering::Relaxed), 3);
    assert_eq!(subscription.take(), [(7, None)]);
}

#[test]
fn who_looked_before_the_table_was_complete_is_woken_although_a_wake_up_is_pending() {
    let table: Table<u32, &'static str> = Table::default();
    let (subscription, wakes) = counted(&table);
    // A consumer that was woken looks, and takes the changes a moment later.
    assert!(!table.is_complete());
    table.set_complete();
    subscription.take();
    assert_eq!(wakes.load(Ordering::Relaxed), 2);
}

#[test]
fn who_is_urgent_is_woken_last_whenever_the_others_subscribed() {
    let table: Table<u32, &'static str> = Table::default();
    let order = Arc::new(Mutex::new(Vec::new()));
    let wake = |name: &'static str| {
        let order = order.clone();
        move || lock(&order).push(name)
    };
    let subscriptions =
        [table.subscribe(wake("early")), table.subscribe_urgently(wake("urgent")), table.subscribe(wake("late"))];
    subscriptions.iter().for_each(|subscription| drop(subscription.take()));
    lock(&order).clear();
    table.put(1, "a");
    assert_eq!(*lock(&order), ["late", "early", "urgent"]);
}

#[test]
fn an_equal_value_wakes_nobody() {
    let table = Table::default();
    table.put(1, "a");
    let (subscription, wakes) = counted(&table);
    subscription.take();
    assert!(!table.put(1, "a"));
    assert!(!table.remove(&2));
    assert_eq!(wakes.load(Ordering::Relaxed), 1);
}

#[test]
fn a_relist_removes_only_when_it_is_complete() {
    let table = Table::default();
    table.put(1, "a");
    table.put(2, "b");
    let mut listing = Listing::begin();
    listing.put(&table, 2, "b2");
    assert_eq!(table.len(), 2, "a partial list removes nothing");
    assert!(!table.is_complete());
    listing.finish(&table);
    assert!(table.is_complete());
    assert_eq!(table.rows(), [(2, Arc::new("b2"))]);
}

#[test]
fn completeness_alone_wakes_the_subscribers_of_an_empty_table() {
    let table = Table::default();
    let (subscription, wakes) = counted(&table);
    subscription.take();
    Listing::begin().finish(&table);
    assert_eq!(wakes.load(Ordering::Relaxed), 2);
    assert!(subscription.take().is_empty());
}

#[test]
fn a_dropped_subscription_costs_nothing_more() {
    let table = Table::default();
    let (subscription, wakes) = counted(&table);
    drop(subscription);
    table.put(1, "a");
    assert_eq!(wakes.load(Ordering::Relaxed), 1);
    assert!(lock(&table.inner.subscribers).is_empty());
}

#[test]
fn no_change_is_lost_between_a_writer_and_a_reader() {
    let table: Table<u32, u32> = Table::default();
    let (wake, woken) = std::sync::mpsc::sync_channel(1);
    let subscription = table.subscribe(move || {
        let _ = wake.try_send(());
    });
    let writer = std::thread::spawn({
        let table = table.clone();
        move || (0..20_000).for_each(|n| assert!(table.put(n % 64, n)))
    });
    let mut last = std::collections::HashMap::new();
    while last.get(&63) != Some(&Some(Arc::new(19_967)))
        || last.len() < 64
        || last.values().any(|v| v.as_ref().is_none_or(|v| **v < 19_936))
    {
        woken.recv_timeout(std::time::Duration::from_secs(20)).expect("every write is followed by a wake-up");
        last.extend(subscription.take());
    }
    writer.join().unwrap();
}

#[test]
fn a_change_is_as_old_as_the_oldest_of_its_causes() {
    let (first, second) = (Table::default(), Table::default());
    let ((of_first, _), (of_second, _)) = (counted(&first), counted(&second));
    let before = Instant::now();
    first.put(1, "a");
    let between = Instant::now();
    first.put(1, "b");
    let (_, _, since) = of_first.take_since()[0];
    assert!(before <= since && since <= between);
    // What follows from it carries its age along.
    second.put_since(1, "c", since);
    assert_eq!(of_second.take_since(), [(1, Some(Arc::new("c")), since)]);
    of_second.mark_all();
    assert!(of_second.take_since()[0].2 > between);
}
