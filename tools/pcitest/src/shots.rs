// SPDX-License-Identifier: GPL-2.0

//! The thread that sends vectors.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use vmbus_host::{Counter, Counters};
use vpci::InterruptSender;

/// What a guest may take to acknowledge an interrupt. It may be emulated twice over.
const ACKNOWLEDGE: Duration = Duration::from_secs(5);
/// Most rounds in a second.
const RATE_MAX: u32 = 10_000;

/// What can be ordered for a range of vectors.
#[derive(Clone, Copy)]
pub enum Order {
    /// So many rounds; each waits for the acknowledgements of the one before.
    Rounds(u32),
    /// So many rounds in a second without an end, which leave out what is not acknowledged.
    Rate(u32),
}

#[derive(Clone, Copy)]
struct Job {
    first: usize,
    end: usize,
    order: Order,
    /// Rounds that were begun.
    done: u32,
}

#[derive(Clone, Copy, Default)]
struct Vector {
    sent: u32,
    /// It was sent and not acknowledged.
    out: bool,
}

struct State {
    job: Option<Job>,
    /// Counts orders: a thread that waits sees that the order is another one.
    orders: u64,
    vectors: Vec<Vector>,
    lost: u32,
    ended: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    interrupts: OnceLock<InterruptSender>,
    sent: Counter,
}

/// Sends vectors by orders. Ends with its value.
pub struct Shots {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Shots {
    /// For so many vectors, without orders.
    pub fn new(vectors: u16, name: &str, counters: &Counters) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                job: None,
                orders: 0,
                vectors: vec![Vector::default(); vectors.into()],
                lost: 0,
                ended: false,
            }),
            changed: Condvar::new(),
            interrupts: OnceLock::new(),
            sent: counters.counter(&format!("{name}.sent")),
        });
        let thread = thread::Builder::new().name(name.to_owned()).spawn({
            let shared = shared.clone();
            move || shared.run()
        })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// From now on vectors go this way.
    pub fn attach(&self, interrupts: InterruptSender) {
        // A function is put on one bus, once.
        let _ = self.shared.interrupts.set(interrupts);
    }

    /// Gives an order in place of the last one. Vectors that cannot be are left out.
    pub fn order(&self, first: u32, count: u32, order: Order) {
        let mut state = self.shared.state();
        let limit = |number: u32| state.vectors.len().min(number as usize);
        let (first, end) = (limit(first), limit(first.saturating_add(count)));
        let nothing = first == end || matches!(order, Order::Rounds(0) | Order::Rate(0));
        state.orders += 1;
        state.job = (!nothing).then_some(Job {
            first,
            end,
            order,
            done: 0,
        });
        drop(state);
        self.shared.changed.notify_all();
    }

    /// The guest has seen an interrupt.
    pub fn acknowledge(&self, vector: usize) {
        if let Some(vector) = self.shared.state().vectors.get_mut(vector) {
            vector.out = false;
        }
        self.shared.changed.notify_all();
    }

    /// Ends all orders and clears what was counted.
    pub fn clear(&self) {
        let mut state = self.shared.state();
        state.orders += 1;
        state.job = None;
        state.vectors.fill(Vector::default());
        state.lost = 0;
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Whether an order is carried out or an interrupt is not acknowledged.
    pub fn is_busy(&self) -> bool {
        let state = self.shared.state();
        state.job.is_some() || state.vectors.iter().any(|vector| vector.out)
    }

    /// Interrupts that were not acknowledged in time.
    pub fn lost(&self) -> u32 {
        self.shared.state().lost
    }

    /// How often a vector was sent.
    pub fn sent(&self, vector: usize) -> u32 {
        let state = self.shared.state();
        state.vectors.get(vector).map_or(0, |vector| vector.sent)
    }
}

impl Drop for Shots {
    fn drop(&mut self) {
        self.shared.state().ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported by the thread itself.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        let waited = self.changed.wait_timeout(state, time);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn run(&self) {
        let mut state = self.state();
        while !state.ended {
            let Some(job) = state.job else {
                state = self.wait(state, ACKNOWLEDGE);
                continue;
            };
            let orders = state.orders;
            drop(state);
            let begin = Instant::now();
            self.round(&job, orders);
            state = self.state();
            if orders != state.orders {
                continue;
            }
            let Some(job) = state.job.as_mut() else {
                continue;
            };
            job.done = job.done.saturating_add(1);
            match job.order {
                Order::Rounds(rounds) if job.done >= rounds => state.job = None,
                Order::Rounds(_) => {}
                Order::Rate(rate) => {
                    let end = begin + Duration::from_secs(1) / rate.min(RATE_MAX);
                    while orders == state.orders && !state.ended && Instant::now() < end {
                        let left = end.saturating_duration_since(Instant::now());
                        state = self.wait(state, left);
                    }
                }
            }
        }
    }

    /// Sends each vector of a range once, unless there is another order meanwhile.
    fn round(&self, job: &Job, orders: u64) {
        for vector in job.first..job.end {
            let mut state = self.state();
            if let Order::Rounds(_) = job.order {
                let deadline = Instant::now() + ACKNOWLEDGE;
                while state.vectors[vector].out && orders == state.orders && !state.ended {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        state.lost += 1;
                        state.vectors[vector].out = false;
                        break;
                    }
                    state = self.wait(state, left);
                }
            }
            if orders != state.orders || state.ended {
                return;
            }
            if state.vectors[vector].out {
                continue;
            }
            state.vectors[vector].out = true;
            state.vectors[vector].sent = state.vectors[vector].sent.wrapping_add(1);
            drop(state);
            self.sent.inc();
            if let Some(interrupts) = self.interrupts.get() {
                interrupts.fire(vector as u16);
            }
        }
    }
}
