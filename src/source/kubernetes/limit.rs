//! The client rate limit: `k8s-client-qps` and `k8s-client-burst`, changeable at any time.
//!
//! Only status writes wait. Leases count against the limit but never wait, or a burst of status writes would cost an
//! election; watches and lists neither count nor wait, their back-off limits them.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

/// A token bucket whose waiters are served in order.
#[derive(Debug)]
pub(super) struct Limiter {
    bucket: Mutex<Bucket>,
    turn: tokio::sync::Mutex<()>,
    changed: Notify,
    waited: AtomicU64,
}

#[derive(Debug)]
struct Bucket {
    /// Calls per second; not above zero means no limit, as in client-go.
    qps: f64,
    burst: f64,
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + elapsed * self.qps).min(self.burst);
        self.filled = now;
    }
}

impl Limiter {
    pub(super) fn new(qps: f64, burst: u32) -> Self {
        let burst = f64::from(burst.max(1));
        Self {
            bucket: Mutex::new(Bucket { qps: sane(qps), burst, tokens: burst, filled: Instant::now() }),
            turn: tokio::sync::Mutex::new(()),
            changed: Notify::new(),
            waited: AtomicU64::new(0),
        }
    }

    /// Changes the limit for those who wait already, too.
    pub(super) fn set(&self, qps: f64, burst: u32) {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.refill(Instant::now());
        bucket.qps = sane(qps);
        let burst = f64::from(burst.max(1));
        // A larger bucket is larger at once.
        bucket.tokens = (bucket.tokens + (burst - bucket.burst).max(0.0)).min(burst);
        bucket.burst = burst;
        drop(bucket);
        self.changed.notify_waiters();
    }

    /// Waits for a token.
    pub(super) async fn acquire(&self) {
        if self.turn.try_lock().is_ok() && self.take().is_none() {
            return;
        }
        self.waited.fetch_add(1, Ordering::Relaxed);
        let _turn = self.turn.lock().await;
        loop {
            let changed = self.changed.notified();
            let Some(wait) = self.take() else { return };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = changed => {}
            }
        }
    }

    /// Takes a token that may not be there yet; those who wait pay for it.
    pub(super) fn charge(&self) {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.refill(Instant::now());
        bucket.tokens = (bucket.tokens - 1.0).max(-bucket.burst);
    }

    /// How many calls had to wait.
    pub(super) fn waited(&self) -> u64 {
        self.waited.load(Ordering::Relaxed)
    }

    /// Takes a token, or says how long until there is one.
    fn take(&self) -> Option<Duration> {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        if bucket.qps <= 0.0 {
            return None;
        }
        bucket.refill(Instant::now());
        if bucket.tokens >= 1.0 {
            bucket.tokens -= 1.0;
            return None;
        }
        let seconds = (1.0 - bucket.tokens) / bucket.qps;
        Some(Duration::from_secs_f64(seconds.clamp(0.001, 60.0)))
    }
}

fn sane(qps: f64) -> f64 {
    if qps.is_finite() { qps } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_passes_and_the_rest_comes_at_the_rate() {
        let limiter = Limiter::new(10.0, 5);
        let start = Instant::now();
        for _ in 0..5 {
            limiter.acquire().await;
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        for _ in 0..10 {
            limiter.acquire().await;
        }
        let elapsed = start.elapsed();
        assert!((Duration::from_millis(990)..Duration::from_millis(1100)).contains(&elapsed), "{elapsed:?}");
        assert_eq!(limiter.waited(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_limit_counts_for_those_who_wait() {
        let limiter = std::sync::Arc::new(Limiter::new(0.01, 1));
        limiter.acquire().await;
        let waiting = tokio::spawn({
            let limiter = limiter.clone();
            async move { limiter.acquire().await }
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!waiting.is_finished());
        let start = Instant::now();
        limiter.set(100.0, 1);
        waiting.await.unwrap();
        assert!(start.elapsed() < Duration::from_millis(50));
    }

    #[tokio::test(start_paused = true)]
    async fn leases_never_wait_but_count() {
        let limiter = Limiter::new(10.0, 2);
        let start = Instant::now();
        for _ in 0..20 {
            limiter.charge();
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        limiter.acquire().await;
        // The debt is bounded by the burst.
        let elapsed = start.elapsed();
        assert!((Duration::from_millis(290)..Duration::from_millis(320)).contains(&elapsed), "{elapsed:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn no_rate_means_no_limit() {
        for qps in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let limiter = Limiter::new(qps, 0);
            for _ in 0..1000 {
                limiter.acquire().await;
            }
            assert_eq!(limiter.waited(), 0);
        }
    }
}
