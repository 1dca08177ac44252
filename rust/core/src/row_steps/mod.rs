//! One step of an optimizer on the rows of a table that a sparse gradient lists, in one pass.
//!
//! ```text
//!   listed rows   7 2 7 5   sorted   2 5 7 7     each row once: its values, its states, the sum of its gradients
//!   gradients     a b c d            b d a+c
//! ```
//!
//! torch coalesces the gradient, makes masks and sparse tensors of it, and adds each to its table: ten passes. Here a row
//! and its states are loaded once. Rows go in the order of memory, and their cache lines are asked for some rows ahead.

mod element;
mod listing;
mod rule;

pub use element::{Element, Real};
pub use listing::Listing;
pub use rule::{Kind, Rule};

use std::sync::{Mutex, PoisonError};

use crate::error::Result;
use crate::memory;
use element::noise;
use listing::{place_of, row_of};

/// So many rows ahead their memory is asked for.
const AHEAD: usize = 12;

/// The bytes of a cache line.
const LINE: usize = 64;

/// A thread is worth its start for so many numbers.
const WORTH_A_THREAD: usize = 1 << 19;

/// A table, its states, and the gradients of some of its rows.
pub struct Step<'a, T: Element> {
    /// What is done to each row.
    pub rule: Rule,
    /// `[capacity, width]`.
    pub values: &'a mut [T],
    /// As many as [`Rule::full_states`], each `[capacity, width]`.
    pub full: Vec<&'a mut [T::Real]>,
    /// As many as [`Rule::single_states`], each `[capacity]`.
    pub single: Vec<&'a mut [T::Real]>,
    /// How many numbers a row has.
    pub width: usize,
    /// `[listed, width]`.
    pub gradients: &'a [T],
    /// Whether, and from which seed, results are rounded to one of their neighbours at random.
    pub seed: Option<u64>,
}

impl<T: Element> Step<'_, T> {
    /// Writes the rows of a listing. **O(k)** for `k` rows; the same bits for any number of threads.
    ///
    /// `prefetch` begins to load what lies at an address.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`](crate::Error::Memory): then nothing has been written.
    ///
    /// # Panics
    ///
    /// If the listing has rows beyond the table, or places beyond the gradients.
    pub fn write(self, listing: &Listing, threads: usize, prefetch: impl Fn(usize) + Sync + Copy) -> Result<()> {
        let entries = listing.entries();
        let work = entries.len() * self.width * (1 + self.full.len());
        let threads = threads.min(work / WORTH_A_THREAD).max(1);
        let mut jobs = memory::with_capacity(threads)?;
        let mut rest = Part { step: self, first: 0, entries, scratch: Scratch::new(0)? };
        for number in 0..threads {
            rest.scratch = Scratch::new(rest.step.width)?;
            let end = border(rest.entries, rest.entries.len() / (threads - number));
            let Some(next) = rest.entries.get(end).map(|entry| row_of(*entry)) else { break };
            let (part, others) = rest.split(end, next)?;
            jobs.push(Mutex::new(Some(part)));
            rest = others;
        }
        let take = |job: &Mutex<Option<Part<'_, T>>>| {
            let part = job.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(mut part) = part {
                part.write(prefetch);
            }
        };
        // The threads end with this call: threads that outlive it would be missing after a fork.
        std::thread::scope(|scope| {
            for job in &jobs {
                // What no thread takes, because there is none, is done below.
                let _ = std::thread::Builder::new().name("pdrs-step".into()).spawn_scoped(scope, || take(job));
            }
            rest.write(prefetch);
            jobs.iter().for_each(take);
        });
        Ok(())
    }
}

/// The number of entries near a wanted one after which another row begins.
fn border(entries: &[u64], wanted: usize) -> usize {
    let Some(last) = wanted.checked_sub(1).and_then(|last| entries.get(last)) else { return wanted };
    wanted + entries[wanted..].iter().take_while(|entry| row_of(**entry) == row_of(*last)).count()
}

/// The rows of a table from a first one on, and what is listed of them.
struct Part<'a, T: Element> {
    step: Step<'a, T>,
    first: usize,
    entries: &'a [u64],
    scratch: Scratch<T::Real>,
}

/// A row and its gradient, to compute with.
struct Scratch<R> {
    values: Vec<R>,
    gradient: Vec<R>,
}

impl<R: Real> Scratch<R> {
    fn new(width: usize) -> Result<Self> {
        let (mut values, mut gradient) = (memory::with_capacity(width)?, memory::with_capacity(width)?);
        values.resize(width, R::ZERO);
        gradient.resize(width, R::ZERO);
        Ok(Self { values, gradient })
    }
}

impl<T: Element> Part<'_, T> {
    /// The rows in front of the row `next`, which the first `end` entries are of, and the others.
    fn split(self, end: usize, next: usize) -> Result<(Self, Self)> {
        let Self { step, first, entries, scratch } = self;
        let Step { rule, values, full, single, width, gradients, seed } = step;
        let rows = next - first;
        let (values, other_values) = values.split_at_mut(rows * width);
        let (full, other_full) = halves(full, rows * width)?;
        let (single, other_single) = halves(single, rows)?;
        let (entries, other_entries) = entries.split_at(end);
        let others =
            Step { rule, values: other_values, full: other_full, single: other_single, width, gradients, seed };
        let step = Step { rule, values, full, single, width, gradients, seed };
        let empty = Scratch::new(0)?;
        Ok((
            Self { step, first, entries, scratch },
            Self { step: others, first: next, entries: other_entries, scratch: empty },
        ))
    }

    fn write(&mut self, prefetch: impl Fn(usize)) {
        let width = self.step.width;
        let mut at = 0;
        // The row up to whose memory all has been asked for.
        let mut asked = 0;
        while at < self.entries.len() {
            while asked < self.entries.len().min(at + AHEAD) {
                self.ask_for(row_of(self.entries[asked]) - self.first, &prefetch);
                asked += 1;
            }
            let row = row_of(self.entries[at]);
            let first = place_of(self.entries[at]) * width;
            for (sum, g) in self.scratch.gradient.iter_mut().zip(&self.step.gradients[first..first + width]) {
                *sum = g.widen();
            }
            at += 1;
            while at < self.entries.len() && row_of(self.entries[at]) == row {
                let place = place_of(self.entries[at]) * width;
                let gradient = &self.step.gradients[place..place + width];
                for (sum, g) in self.scratch.gradient.iter_mut().zip(gradient) {
                    *sum = *sum + g.widen();
                }
                at += 1;
            }
            self.write_row(row - self.first);
        }
    }

    #[inline]
    fn ask_for(&self, row: usize, prefetch: impl Fn(usize)) {
        let width = self.step.width;
        let lines = |address: usize, bytes: usize| {
            (address..address + bytes).step_by(LINE).for_each(&prefetch);
        };
        lines(self.step.values.as_ptr().addr() + row * width * size_of::<T>(), width * size_of::<T>());
        for state in &self.step.full {
            lines(state.as_ptr().addr() + row * width * size_of::<T::Real>(), width * size_of::<T::Real>());
        }
        for state in &self.step.single {
            prefetch(state.as_ptr().addr() + row * size_of::<T::Real>());
        }
    }

    #[inline]
    fn write_row(&mut self, row: usize) {
        let Step { rule, values, full, single, width, seed, .. } = &mut self.step;
        let (begin, end) = (row * *width, (row + 1) * *width);
        let place = (self.first + row) * *width;
        let values = &mut values[begin..end];
        let Scratch { values: computed, gradient } = &mut self.scratch;
        for (wide, value) in computed.iter_mut().zip(&*values) {
            *wide = value.widen();
        }
        let mut states = full.iter_mut();
        let mut next = || states.next().map(|state| &mut state[begin..end]).unwrap_or_default();
        let states = [next(), next(), next()];
        let mut numbers = single.iter_mut();
        let mut next = || numbers.next().map(|state| &mut state[row]);
        rule.apply(computed, states, [next(), next()], gradient);
        match *seed {
            None => values.iter_mut().zip(&*computed).for_each(|(value, wide)| *value = T::narrow(*wide, None)),
            Some(seed) => {
                for (at, (value, wide)) in values.iter_mut().zip(&*computed).enumerate() {
                    *value = T::narrow(*wide, Some(noise(seed, place + at)));
                }
            }
        }
    }
}

/// The two parts of each of some slices.
#[allow(clippy::type_complexity, reason = "two lists of slices")]
fn halves<R>(slices: Vec<&mut [R]>, at: usize) -> Result<(Vec<&mut [R]>, Vec<&mut [R]>)> {
    let (mut one, mut other) = (memory::with_capacity(slices.len())?, memory::with_capacity(slices.len())?);
    for slice in slices {
        let (front, behind) = slice.split_at_mut(at);
        one.push(front);
        other.push(behind);
    }
    Ok((one, other))
}

/// Adds up what a gradient has for a row that is listed several times, where it is listed first. The others become zeros.
///
/// **O(k)** for `k` rows.
///
/// # Errors
///
/// [`Error::Memory`](crate::Error::Memory).
///
/// # Panics
///
/// If the listing has places beyond the gradients.
pub fn sum_repeated<T: Element>(listing: &Listing, gradients: &mut [T], width: usize) -> Result<()> {
    let mut sum = Scratch::<T::Real>::new(width)?.values;
    for same in listing.entries().chunk_by(|one, other| row_of(*one) == row_of(*other)) {
        let [first, others @ ..] = same else { continue };
        if others.is_empty() {
            continue;
        }
        sum.fill(T::Real::ZERO);
        for entry in same {
            let place = place_of(*entry) * width;
            let gradient = &mut gradients[place..place + width];
            for (sum, g) in sum.iter_mut().zip(gradient) {
                *sum = *sum + g.widen();
                *g = T::narrow(T::Real::ZERO, None);
            }
        }
        let place = place_of(*first) * width;
        for (g, sum) in gradients[place..place + width].iter_mut().zip(&sum) {
            *g = T::narrow(*sum, None);
        }
    }
    Ok(())
}
