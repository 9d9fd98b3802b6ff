// SPDX-License-Identifier: GPL-2.0

//! Counters by name.

use std::{
    collections::BTreeMap,
    sync::{
        atomic::{AtomicU64, Ordering},
        Arc, Mutex,
    },
};

use crate::lock;

/// One counter; clones count together. Also for amounts that go down again.
#[derive(Clone, Debug, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    /// Adds.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Subtracts; stops at zero.
    pub fn sub(&self, n: u64) {
        // The closure never returns None, so there is no failure to handle.
        let _ = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| {
                Some(old.saturating_sub(n))
            });
    }

    /// Sets.
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All counters of the lab.
#[derive(Debug, Default)]
pub struct Counters(Mutex<BTreeMap<String, Counter>>);

impl Counters {
    /// No counters yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The counter of that name, made if it does not exist. Keep it: this takes a lock.
    pub fn counter(&self, name: &str) -> Counter {
        let mut counters = lock(&self.0);
        match counters.get(name) {
            Some(counter) => counter.clone(),
            None => counters.entry(name.to_owned()).or_default().clone(),
        }
    }

    /// All values.
    pub fn snapshot(&self) -> BTreeMap<String, u64> {
        lock(&self.0)
            .iter()
            .map(|(name, counter)| (name.clone(), counter.get()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_counter_for_one_name() {
        let counters = Counters::new();
        let a = counters.counter("a");
        counters.counter("a").add(3);
        a.inc();
        a.sub(1);
        assert_eq!(counters.snapshot(), BTreeMap::from([("a".to_owned(), 3)]));
        a.sub(9);
        assert_eq!(a.get(), 0);
    }
}
